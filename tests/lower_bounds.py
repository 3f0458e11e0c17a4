"""
The lowest versions that `setup.cfg` states, tried: what is stated is what passed.

    python tests/lower_bounds.py FOLDER [pytest's arguments]

makes a virtual environment in FOLDER, or takes what an earlier call left there, with exactly the lowest stated version
of each requirement and of what the tests need besides. It prints the versions and runs those test files that use
foreign libraries most, or others that pytest's arguments name. Nothing but the package index is asked. On Linux
without a GPU, let pip find torch's CPU build (`PIP_FIND_LINKS`), or some gigabytes more are installed.
"""

import configparser
import os
import re
import subprocess
import sys
import venv
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]
TOOLS = ("pytest", "pytest-xdist", "rich", "scipy")  # of the extras, those that these tests need
SELECTION = (
    *("backbones", "test_callbacks.py", "test_ddpo_compat.py", "test_fuzz.py", "test_hub.py", "test_policy.py"),
    *("test_prompt_embeds.py", "test_report.py", "test_rollout_dataset.py", "test_security.py"),
    *("rewards/test_chat.py", "rewards/test_clip.py", "rewards/test_detect.py", "rewards/test_geneval.py"),
    *("rewards/test_http.py", "rewards/test_image_reward.py", "rewards/test_remote.py", "rewards/test_model.py"),
    *("trainer/test_base_trainer.py", "trainer/test_config_fields.py", "trainer/test_dgpo_config.py"),
    *("trainer/test_data.py", "trainer/test_dgpo_trainer.py", "trainer/test_options.py", "trainer/test_offline.py"),
    *("trainer/test_flow_grpo_trainer.py", "trainer/test_gpo_trainer.py", "trainer/test_trl_contract.py"),
)


def lowest(setup: str) -> list[str]:
    """
    Each requirement at its lowest version.

    Args:
        setup (`str`):
            Text of a `setup.cfg`.

    Raises:
        `ValueError`: for a requirement without a lower bound.
    """
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(setup)
    extras = "\n".join(config["options.extras_require"].values()).splitlines()
    required = config["options"]["install_requires"].splitlines()
    required += [line for line in extras if re.split("[><=]", line)[0] in TOOLS]
    pins = []
    for line in required:
        if not line or line.startswith("#"):
            continue
        bound = re.match(r"([\w.-]+)>=([\w.]+)", line)
        if bound is None:
            raise ValueError(f"{line!r} in setup.cfg has no lower bound; write it as `name>=version`.")
        pins.append("==".join(bound.groups()))
    return pins


def main(folder: str, *arguments: str) -> int:
    pins = lowest((REPOSITORY / "setup.cfg").read_text(encoding="utf-8"))
    python = Path(folder) / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    names = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    shown = [line for line in listed.stdout.splitlines() if line.partition("==")[0].lower().replace("_", "-") in names]
    print(f"Python {sys.version.split()[0]}", *shown, sep="\n", flush=True)
    tests = [str(REPOSITORY / "tests" / name) for name in SELECTION]
    if any((REPOSITORY / argument.partition("::")[0]).exists() for argument in arguments):
        tests = []
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([python, "-m", "pytest", *tests, *arguments], cwd=REPOSITORY, env=environment).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
