"""The page on replay says what the code does."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from hybrid_policy.evaluation import convert_command, replay_command
from hybrid_policy.evaluation.report import fill_tables

PAGE = Path(__file__).resolve().parents[5] / "docs" / "replay.md"


@pytest.fixture
def page() -> str:
    if not PAGE.exists():
        pytest.skip("the repository's docs/ is not beside this package")
    return PAGE.read_text("utf-8")


def test_its_tables_are_the_codes(page):
    assert fill_tables(page) == page, f"run: python -m hybrid_policy.evaluation.report {PAGE}"


def test_every_option_it_names_exists(page):
    known: set[str] = set()
    for command in (replay_command, convert_command):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        known |= {option for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    assert named - known == set()


def test_the_pictures_it_shows_exist(page):
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (PAGE.parent / name).exists(), name
