"""`python -m recipes.lite FOLDER`: build the wheel of florence2-lite in a folder."""

import argparse
from pathlib import Path

from recipes.lite.wheel import build_wheel

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m recipes.lite", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    print(build_wheel(parser.parse_args().folder))
