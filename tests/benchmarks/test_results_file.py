"""The file of a benchmark's records: continued where it is of the same machine, and with a command that runs again."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.results_file import Results

ROOT = Path(__file__).parents[2]


def test_results_are_continued_on_the_same_device_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    record = {"section": "tail", "name": "a", "contender": "b"}
    Results(path, {}).add({**record, "seconds": 1})
    second = Results(path, {})
    second.add({**record, "contender": "c", "seconds": 2})
    second.add({**record, "seconds": 3})
    content = json.loads(path.read_text())
    assert [(r["contender"], r["seconds"], r["run"]) for r in content["records"]] == [("c", 2, 1), ("b", 3, 1)]
    path.write_text(json.dumps({**content, "device": "another"}))
    assert Results(path, {}).content["records"] == []
    path.write_text(json.dumps({name: content[name] for name in ("device", "versions")} | {"seconds": 1}))
    assert Results(path, {}).content["records"] == [], "a file of another form"


def test_the_command_of_a_run_is_one(tmp_path: Path) -> None:
    """What a file says made it makes it again."""
    path = tmp_path / "with space.json"
    command = ["python", "-m", "benchmarks.choice", "--time_limit=0", f"--output={path}"]
    for runs in (1, 2):
        subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True, capture_output=True)
        commands = [run["command"] for run in json.loads(path.read_text())["runs"]]
        assert commands == [shlex.join(command)] * runs
        command = shlex.split(commands[-1])
