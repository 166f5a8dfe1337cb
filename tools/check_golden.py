"""Check our numbers against fixtures of the published reference implementation.

    python tools/check_golden.py DIR [DIR ...] [--device cuda]

Each DIR holds a manifest.json and safetensors files. The masks, noise levels and the draw of the fast
weights come from the fixture; our model, inner loop and outer loss compute the rest. One line per
quantity; exit status 1 if any is out of tolerance, 2 if a fixture is of a kind that is not supported
yet or cannot be read.
"""

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


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("check_golden.py", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="fixture directory")
    parser.add_argument(
        "--device",
        default="cpu",
        choices=sorted({"cpu", device_type()}),
        help="where the model computes (default: cpu)",
    )
    options = parser.parse_args(argv)
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
        except UserError as mistake:
            print(f"  {mistake}")
            status = 2
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            print(f"  cannot read the fixture ({type(error).__name__}: {error}); see the format's README")
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
