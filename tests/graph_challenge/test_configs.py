"""The flagfiles of the challenge's networks: exactly those, and each one that the program's flags accept."""

from pathlib import Path

import pytest
from absl import flags

from spdnn_jax.command_line import options
from spdnn_jax.graph_challenge import networks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NETWORKS = {f"{neurons}x{layers}": (neurons, layers) for neurons in networks.NEURONS for layers in networks.LAYERS}


def parse(path: Path) -> flags.FlagValues:
    """The program's flags, set from a flagfile, without touching the global ones."""
    values = flags.FlagValues()
    for flag in options.defined():
        flags.DEFINE_flag(flag.__deepcopy__({}), flag_values=values)
    values(["spdnn", f"--flagfile={path}"])
    return values


def test_there_is_one_for_each_network() -> None:
    assert {path.stem for path in CONFIGS.glob("*.flags")} == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_is_accepted_and_names_its_network(name: str) -> None:
    """A misspelt flag, or a copy that still names another network, would only show on the day it is run."""
    values = parse(CONFIGS / f"{name}.flags")
    assert (values["neurons"].value, values["layers"].value) == NETWORKS[name]
    assert values["features"].value == networks.FEATURES
    assert values["compress"].value == "none"


@pytest.mark.parametrize(
    ("name", "devices", "address"), [("2-gpus", 2, None), ("8-gpus", 8, None), ("slurm", None, "auto")]
)
def test_launch_files(name: str, devices: int | None, address: str | None) -> None:
    """Clusters are booked by the hour: a misspelt flag costs one."""
    values = parse(CONFIGS / "cluster" / f"{name}.flags")
    assert values["backend"].value == "cuda"
    assert (values["devices"].value, values["coordinator_address"].value) == (devices, address)
