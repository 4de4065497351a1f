"""What README and docs say: commands parse, links lead somewhere, generated tables are what their sources say."""

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest

from common import runs

PAGES = [runs.REPOSITORY / "README.md", *sorted((runs.REPOSITORY / "docs").glob("*.md"))]
COMMAND = re.compile(r"^\s*(?:\$ )?python (?P<line>[\w/]+\.py.*?)(?:\s{2,}.*|\s+#.*)?$", re.MULTILINE)
SCRIPTS = [*runs.REPOSITORY.glob("*.py"), *(runs.REPOSITORY / "benchmarks").glob("*.py")]


def commands():
    texts = [(page.name, page.read_text(encoding="utf-8")) for page in PAGES]
    texts += [(path.name, path.read_text(encoding="utf-8").split('"""')[1]) for path in SCRIPTS]
    found = [(name, match["line"].strip("` ")) for name, text in texts for match in COMMAND.finditer(text)]
    return [(name, line) for name, line in found if not line.startswith("my_experiment")]


class Parsed(Exception):
    pass


@pytest.mark.parametrize(("page", "line"), commands())
def test_documented_command_parses(page, line, monkeypatch):
    """The script's own parser takes every command that a document shows."""
    script, *words = shlex.split(line)
    spec = importlib.util.spec_from_file_location("script_under_test", runs.REPOSITORY / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parse = runs.Parser.parse_args

    def stop_after_parsing(self, argv=None, namespace=None):
        raise Parsed(parse(self, argv, namespace))

    monkeypatch.setattr(runs.Parser, "parse_args", stop_after_parsing)
    with pytest.raises(Parsed) as parsed:
        module.main(words)
    assert isinstance(parsed.value.args[0], argparse.Namespace)


def test_there_are_commands_to_check():
    assert {line.split()[0] for _, line in commands()} >= {"1_prepare_data.py", "8_pruning_with_finetuning.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_generated_text_is_what_its_sources_say():
    done = subprocess.run([sys.executable, "benchmarks/update_readme.py", "--check"], cwd=runs.REPOSITORY, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_script_has_a_manual_page_and_can_be_read_in_a_sitting():
    for script in runs.REPOSITORY.glob("*.py"):
        assert (runs.REPOSITORY / "docs" / f"{script.stem}.md").exists()
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 350, script.name


@pytest.mark.parametrize("script", [*runs.REPOSITORY.glob("*.py")], ids=lambda path: path.name)
def test_every_flag_is_in_the_manual_page(script, capsys):
    spec = importlib.util.spec_from_file_location("script_under_test", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    flags = set(re.findall(r"--[a-z_]+", capsys.readouterr().out)) - {"--help"}
    page = (runs.REPOSITORY / "docs" / f"{script.stem}.md").read_text(encoding="utf-8")
    assert len(flags) > 5
    assert not [flag for flag in flags if flag not in page]
