"""Compare the numbers of this implementation with fixtures of the published reference implementation.

Examples:
  python tools/check_golden.py tests/golden/dense_pmc_ce
  python tools/check_golden.py tests/golden/dense_pmc_ce tests/golden/sampler_low_confidence --device cpu

Each DIR holds a manifest.json and safetensors files. The masks, noise levels and initial fast weights come from the
fixture; our model, inner loop and outer loss compute the rest. The command prints one line per quantity. Exit status:
0 if all are within tolerance, 1 if any is not, 2 if a fixture cannot be read or its kind is not supported.
"""

import argparse
import sys
from pathlib import Path

from safetensors import SafetensorError

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.errors import UserError
from memdlm_dist.golden.checks import check
from memdlm_dist.golden.fixture import Unsupported
from memdlm_dist.runtime.device import device_type
from memdlm_dist.runtime.entry_point import new_parser


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    p = new_parser("check_golden.py", __doc__)
    p.usage = "check_golden.py DIR [DIR ...] [options]"
    data = p.add_argument_group("data")
    data.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of a fixture")
    hardware = p.add_argument_group("hardware")
    hardware.add_argument(
        "--device",
        default="cpu",
        choices=sorted({"cpu", device_type()}),
        help="device that runs the model (default: cpu)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parser().parse_args(argv)
    status = 0
    for folder in options.folders:
        print(folder)
        try:
            for line in check(folder, options.device):
                print(line)
                if not line.ok:
                    status = max(status, 1)
        except Unsupported as reason:
            print(f"  {reason}")
            status = 2
        except UserError as error:
            print(f"  {error}")
            status = 2
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            print(
                f"  cannot read the fixture ({type(error).__name__}: {error}); memdlm_dist/golden/fixture.py describes "
                "the format."
            )
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
