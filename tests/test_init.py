"""The package's own names, before anything of it is loaded."""

import subprocess
import sys


def test_public_names_are_listed_without_being_loaded() -> None:
    script = (
        "import sys, fusionroute\n"
        "print(sorted(set(fusionroute.__all__) - set(dir(fusionroute))))\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
