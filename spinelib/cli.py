"""The command ``spinelib``: run, predict, train, doctor, check.

Everything heavy is imported by the command that needs it, so that ``--help`` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence

from spinelib import __version__
from spinelib.errors import SpinelibError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return 0 (done), 1 (a step failed), 2 (bad input) or 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["train"]:  # train has its own parser, the same under torchrun
            return _train(words[1:])
        arguments = _parser().parse_args(words)
        return arguments.handler(arguments)
    except SpinelibError as error:
        print(f"spinelib: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("\nspinelib: interrupted; the same command continues where this one stopped.", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spinelib",
        description="3D spine shape, with known error, from a DXA scan, two radiographs, CT or MR.",
        epilog="Research software, not a medical device.",
    )
    parser.add_argument("--version", action="version", version=f"spinelib {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_predict(commands)
    commands.add_parser("train", help="train a model (spinelib train --help)")
    _add_doctor(commands)
    _add_check(commands)
    return parser


def _add_command(commands, name: str, help_line: str, example: str, handler) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_line,
        description=help_line[0].upper() + help_line[1:] + ".",
        epilog=f"Example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def _add_run(commands) -> None:
    parser = _add_command(
        commands,
        "run",
        "run the notebooks and write reports/<run-id>/index.html",
        "spinelib run 03 04 --profile laptop -p seed=1 --run-id seed1\n"
        "  spinelib run --sweep notebooks/params/ablation_curves.yml",
        _run,
    )
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="numbers or names, such as 03; default: all")
    parser.add_argument("--profile", help="smoke, laptop, gpu or a YAML file (default: laptop, or what the sweep says)")
    parser.add_argument("-p", dest="assignments", action="append", default=[], metavar="NAME=VALUE", help="a parameter")
    parser.add_argument("--run-id", help="folder under reports/ (default: the profile's or sweep's name)")
    parser.add_argument("--fresh", action="store_true", help="forget what this run has done and start over")
    parser.add_argument("--list", action="store_true", help="print the notebooks, profiles and sweeps, run nothing")
    parser.add_argument("--sweep", metavar="FILE", help="a YAML file of variants: one run each, compared in a table")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants of the sweep only")


def _add_predict(commands) -> None:
    parser = _add_command(
        commands,
        "predict",
        "predict a 3D spine from one DXA scan, two radiographs or a CT, segment a CT, or register it to an MR",
        "spinelib predict scan.dcm -o out/\n  spinelib predict --segment ct.nii.gz -o out/\n"
        "  spinelib predict --ap ap.png --lat lat.png --centroids points.csv --spacing 0.2 0.2 -o out/\n"
        "  spinelib predict --register ct.nii.gz mr.nii.gz --labels ct_mask.nii.gz -o out/",
        _predict,
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="a DXA image, or two radiographs: DICOM, PNG, NIfTI")
    parser.add_argument("--ct", metavar="VOLUME", help="a CT (NIfTI or DICOM folder) instead of INPUT")
    parser.add_argument(
        "--segment", metavar="CT", help="segment and name the vertebrae of a CT (NIfTI or DICOM folder)"
    )
    parser.add_argument(
        "--register", nargs=2, metavar=("CT", "MR"), help="lay a CT on an MR, vertebrae rigid; needs --labels"
    )
    parser.add_argument("--labels", metavar="CT_MASK", help="vertebrae of the CT, numbered as VerSe does")
    parser.add_argument("--ap", metavar="IMAGE", help="frontal radiograph (patient's right on the left); needs --lat")
    parser.add_argument("--lat", metavar="IMAGE", help="lateral radiograph (anterior on the left)")
    parser.add_argument(
        "--centroids",
        metavar="POINTS",
        help="body centres on both: CSV with level,view,row,col (view: ap, lat) or JSON",
    )
    parser.add_argument("--source-detector", type=float, default=1800.0, metavar="MM", help="of both radiographs")
    parser.add_argument("--source-object", type=float, default=1500.0, metavar="MM", help="source to patient's middle")
    parser.add_argument("-o", "--output", metavar="OUT", default="prediction", help="folder for the results")
    parser.add_argument(
        "--spacing",
        nargs=2,
        type=float,
        metavar=("ROW", "COL"),
        help="pixel size in mm where the file has none",
    )
    parser.add_argument("--weights", metavar="FILE", help="safetensors file (default: the shipped weights)")
    parser.add_argument("--force", action="store_true", help="replace an earlier prediction in OUT")


def _add_doctor(commands) -> None:
    parser = _add_command(
        commands, "doctor", "check that this machine has what a run needs", "spinelib doctor", _doctor
    )
    parser.add_argument("--data-dir", help="folder for images that are too large for the clone (default: data)")


def _add_check(commands) -> None:
    parser = _add_command(
        commands,
        "check",
        "check a manifest, or a folder before it is shared",
        "spinelib check cohort.csv\n  spinelib check --before-sharing reports/laptop",
        _check,
    )
    parser.add_argument("manifest", nargs="?", metavar="MANIFEST.csv", help="a table of images to check")
    parser.add_argument(
        "--before-sharing",
        nargs="+",
        metavar="PATH",
        help="scan for participant data: identifiers, DICOM, outputs",
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.sweep or arguments.only:
        from spinelib.sweep import sweep_command

        return sweep_command(arguments)
    from spinelib.run import run_command

    return run_command(arguments)


def _predict(arguments: argparse.Namespace) -> int:
    if arguments.register or arguments.labels:
        from spinelib.register import register_command

        return register_command(arguments)
    if arguments.ap or arguments.lat or arguments.centroids:
        from spinelib.radiographs import radiographs_command

        return radiographs_command(arguments)
    if arguments.segment:
        from spinelib.segment import segment_command

        return segment_command(arguments)
    from spinelib.predict import predict_command

    return predict_command(arguments) or 0


def _train(words: list[str]) -> int:
    if words[:1] == ["vertebrae"]:
        from spinelib.vertebra_training import main as train_vertebrae

        return train_vertebrae(words[1:])
    if words[:1] == ["transvert"]:
        from spinelib.radiograph_training import main as train_transvert

        return train_transvert(words[1:])
    if words[:1] == ["ctmr"]:
        from spinelib.registration_training import main as train_ctmr

        return train_ctmr(words[1:])
    from spinelib.curve_training import main as train

    return train(words) or 0


def _doctor(arguments: argparse.Namespace) -> int:
    from spinelib.doctor import doctor_command

    return doctor_command(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from spinelib.check import check_command

    return check_command(arguments)
