"""What decoding costs: `fusionroute bench decode` without the command line's start-up.

python benchmarks/decode.py [--quick] [--json] [--plot out.png]
"""

import sys

from fusionroute.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "decode"]
    main()
