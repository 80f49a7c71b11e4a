"""See that wheels hold each tracked file of their package, and nothing else: python .ci/contents.py WHEEL..."""

import subprocess
import sys
from zipfile import ZipFile

for wheel in sys.argv[1:]:
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    (package,) = {name.partition("/")[0] for name in held}
    listed = subprocess.check_output(["git", "ls-files", "-z", f"src/{package}"], text=True).split("\0")
    tracked = {name.removeprefix("src/") for name in listed if name}
    print(f"{package}: {len(held)} files")
    if held != tracked:
        sys.exit(f"{wheel} lacks {sorted(tracked - held)} and has {sorted(held - tracked)} beside what is tracked")
