"""Parametric anatomy: sampled people, their spines as signed distances, and their images."""
