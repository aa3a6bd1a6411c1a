"""The command line, `siglip-fast embed | demo | tune | info`: arguments only; the work is in a module each."""

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator

from .. import __version__
from ..errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


NUMBER = {"type": positive_integer, "metavar": "N"}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status. --help and usage errors raise SystemExit (argparse)."""
    args = _parser().parse_args(argv)
    try:
        with _sigterm_interrupts():
            # on demand: --help needs neither torch nor transformers
            return importlib.import_module(f".{args.command}", __package__).run(args)
    except (UserError, OSError) as error:  # OSError: no space left, a folder that may not be written to
        print(f"siglip-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"siglip-fast: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 143 if interrupt.args else 130


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, which `kill`, systemd and Kubernetes send, leaves behind no more than Ctrl-C."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt("terminated")

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="siglip-fast", description="The SigLIP vision encoder, fast.")
    parser.add_argument("--version", action="version", version=f"siglip-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    _add_embed(commands)
    _add_demo(commands)
    _add_tune(commands)
    _add_info(commands)
    return parser


def _add_embed(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "embed",
        help="embed images into a Parquet or .npy file, or into a folder of Parquet files",
        description="Embeds images in the order given, each path once. Unreadable: named and skipped.",
        epilog="Exit status: 0 every image is embedded; 1 done, but some images were skipped; "
        "2 could not start, or nothing was embedded; 130 interrupted, 143 terminated. A file appears whole or not at all; "
        "a folder gets whole parts, and the same command once more does what is left.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="an image, a folder (searched recursively for image files), a glob such as 'photos/**/*.jpg', .parquet files "
        "with a column of encoded images, or .tar shards as WebDataset has them; of one kind in a run",
    )
    parser.add_argument(
        "--from-file",
        metavar="LIST",
        help="instead of PATH, a file with the names of files, one a line, or each ended by NUL (find -print0); - is stdin",
    )
    parser.add_argument(
        "--out",
        metavar="FILE_OR_FOLDER",
        help="NAME.parquet (columns path, embedding); NAME.npy (float32 [images, hidden_size]) with the paths, one a line, in "
        "NAME.paths.txt; or a folder, a name without a dot or with / at its end, which gets part-*.parquet files and in "
        "_errors the images without embedding (path, error). With other inputs or settings than before a folder is refused",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="measure the decoding of the images alone: no weights, no --out; tells images/s and the cores for 1,000/s",
    )
    _add_model(parser.add_mutually_exclusive_group(required=True), random_weights=None)
    parser.add_argument(
        "--pool",
        choices=("head", "mean"),
        default="head",
        help="head: the model's attention pooling; mean: the mean of its last_hidden_state tokens (default: head)",
    )
    parser.add_argument("--normalize", action="store_true", help="scale each embedding to length 1")
    parser.add_argument("--batch-size", **NUMBER, default=32, help="default: 32")
    parser.add_argument(
        "--workers",
        **NUMBER,
        help="processes that decode images ahead of the model, threads where images are few (default: one a core that may be "
        "used; threads of a Ray worker: at most 8)",
    )
    parser.add_argument(
        "--decoder",
        choices=("pillow", "torch", "simplejpeg", "auto"),
        default="pillow",
        help="pillow: the pixels of Hugging Face's image processor; torch (which resizes) and simplejpeg (extra 'fast') are "
        "faster and within about a level of 255; auto: the fastest here, which is measured (default: pillow)",
    )
    parser.add_argument(
        "--draft",
        action="store_true",
        help="decode large JPEGs at a fraction of their size, at least twice what the model takes: faster, other pixels",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the model; embeddings are always float32 (default: bfloat16 on cuda, else float32)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing file; of a folder, begin anew")
    _add_parts(parser)
    _add_where(parser, several="; of CUDA several: cuda:0,cuda:1")
    _add_ray(parser)


def _add_parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part-size",
        **NUMBER,
        help="of a folder: images a part, which is what is done again after a failure; of Parquet files whole row groups "
        "of no more rows, or one; a tar shard is a part (default: 4096)",
    )
    parser.add_argument(
        "--image-column",
        metavar="NAME",
        help="of Parquet files: encoded images as binary, or Hugging Face's struct of bytes and path (default: image); of "
        "tar shards: the images' extension, all that follows the first dot (default: every image's that has no second dot)",
    )
    parser.add_argument(
        "--id-column",
        metavar="NAME",
        help="of Parquet files: what the output has as path; a null is replaced by FILE:ROW (default: path, else the "
        "path in Hugging Face's struct)",
    )


def _add_ray(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "Ray",
        "For collections that take many GPUs or machines. --out names a folder. On a cluster, every machine must see "
        "inputs, model and output under the same names (a shared file system). Needs the extra: pip install -e '.[ray]' in "
        "the checkout.",
    )
    group.add_argument("--ray", action="store_true", help="embed on Ray")
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="a cluster to join (default: RAY_ADDRESS, else this machine only)"
    )
    group.add_argument(
        "--ray-actors", **NUMBER, help="processes with a model each (default: one a GPU; without GPUs one a machine)"
    )


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="compare with stock transformers on a few photographs, and draw what the model sees",
        description="Runs photographs that come with scikit-image through stock transformers, with sdpa and eager "
        "attention, and through siglip_fast with the same weights in float32, prints how well they agree and how fast "
        "each is, and draws each photograph above the principal components of its tokens.",
        epilog="Needs the extra: pip install -e '.[demo]' in the checkout. Exit status: 0 they agree to 1e-4; "
        "1 they do not; 2 could not start; 130 interrupted, 143 terminated.",
    )
    parser.add_argument(
        "--out",
        default="siglip_fast_demo.png",
        metavar="FILE.png",
        help="the picture; an existing one is overwritten (default: siglip_fast_demo.png)",
    )
    _add_model(parser.add_mutually_exclusive_group(), random_weights="base-patch16-224")
    _add_where(parser)


def _add_tune(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure what runs each operation fastest on this GPU; later forwards use it",
        description="Verifies and times, for each operation of a model, every configuration of the Triton kernels "
        "and every route of the vendor's libraries, in a process of its own. What won is kept in a cache file "
        "(SIGLIP_FAST_CACHE_DIR, default: the user's cache folder) for this GPU, driver, torch and Triton. "
        "Weights do not matter, only the model's shape.",
        epilog="Exit status: 0 everything is measured; 1 some of it is not; 2 could not start; 130 interrupted, 143 terminated "
        "(what was measured by then is kept).",
    )
    _add_model(parser.add_mutually_exclusive_group(), random_weights="base-patch16-224")
    parser.add_argument(
        "--batch-sizes",
        **NUMBER,
        nargs="+",
        default=[1, 8, 64],
        help="images a forward; batches up to four times larger or smaller run as the nearest of these (default: 1 8 64)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model (default: bfloat16)")
    parser.add_argument(
        "--budget", type=float, default=900, metavar="SECONDS", help="start nothing new after so long (default: 900)"
    )
    parser.add_argument("--force", action="store_true", help="measure again what the cache holds")
    parser.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, … (default: cuda)")


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "info",
        help="what would run here, why, and in how much memory",
        description="Prints versions, the device, the backend that runs a model on it and why, and the memory "
        "that its derived weights take beside the parameters.",
    )
    _add_model(parser.add_mutually_exclusive_group(), random_weights="base-patch16-224")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")
    _add_where(parser)


def _add_model(group: argparse._MutuallyExclusiveGroup, random_weights: str | None) -> None:
    group.add_argument(
        "--model", metavar="DIR_OR_HUB_ID", help="a SigLIP or SigLIP 2 checkpoint, with or without text tower"
    )
    default = f" (default: {random_weights})" if random_weights else ""
    group.add_argument(
        "--random-weights",
        default=random_weights,
        metavar="VARIANT",
        help=f"an untrained model of a published shape, such as base-patch16-224 or base-patch16-naflex; for trials only{default}",
    )


def _add_where(parser: argparse.ArgumentParser, several: str = "") -> None:
    parser.add_argument(
        "--device", metavar="DEVICE", help=f"cpu, cuda, cuda:1, …{several} (default: cuda if there is one)"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "triton", "cpu", "torch"),
        help="what runs the model (default: SIGLIP_FAST_BACKEND, else auto)",
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        default=None,
        help="the same bits for an image in every batch (default: SIGLIP_FAST_BATCH_INVARIANT, else not)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --random-weights (default: 0)")
