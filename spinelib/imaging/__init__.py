"""Images of a body: what the modalities see, how files are read, and whether an image is usable.

`physics` holds the tissue table; `dxa`, `mri` and `ct` turn anatomy into images; `readers` reads and writes
files; `quality` refuses images that show something else.
"""
