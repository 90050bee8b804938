"""The demo's text: docstrings of installed packages in source order, and every way this can fail."""

import ast
import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from helpers.sources import read

from ki_ds.corpus import documentation as module
from ki_ds.corpus.documentation import write_documentation
from ki_ds.errors import UserError
from ki_ds.experiment.sources import JsonLinesSource

LONG = "A docstring that is long enough to be kept. " * 6


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Writes a package's files where the import system finds them."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(contents):
        for name, content in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def docs(*names):
    """What a corpus reads from the file that is written."""
    with tempfile.TemporaryDirectory() as folder:
        write_documentation(Path(folder, "documentation.jsonl"), names)
        return read(JsonLinesSource(jsonl="documentation.jsonl"), bases=[Path(folder)])


def refusal(*names):
    with pytest.raises(UserError) as raised:
        docs(*names)
    return str(raised.value)


def test_docstrings_in_source_order(installed):
    body = f'''"""module {LONG}"""
raise RuntimeError("this file must not be imported")
class A:
    """class {LONG}

        indented {LONG}
    """
    def short(self):
        "short"
        def inner():
            """inner {LONG}"""
    async def method(self):
        """method {LONG}"""
try:
    def tried():
        """tried {LONG}"""
except ImportError:
    def caught():
        """caught {LONG}"""
else:
    match 1:
        case 1:
            if 0:
                pass
            else:
                def elsewhere():
                    """elsewhere {LONG}"""
text = """no docstring {LONG}"""
def escaped():
    """escaped \\d {LONG}"""
'''
    installed({"kids_pkg/b.py": body, "kids_pkg/__init__.py": "", "kids_pkg/a/first.py": f'"""first {LONG}"""'})
    found = docs("kids_pkg")
    order = ["first", "module", "class", "inner", "method", "tried", "caught", "elsewhere", "escaped"]
    assert [text.split()[0] for text in found] == order
    assert f"\n\n    indented {LONG.strip()}" in found[2] or f"\n\nindented {LONG.strip()}" in found[2]
    assert "kids_pkg" not in sys.modules


def test_docstring_of_199_characters_is_left_out(installed):
    installed({"kids_len.py": f'"""{"x" * 199}"""\ndef f():\n    """\n    {"y" * 200}\n    """\n'})
    assert docs("kids_len") == ["y" * 200]


def test_packages_in_the_order_given_and_single_file_modules(installed):
    installed({"kids_z.py": f'"""z {LONG}"""', "kids_a.py": f'"""a {LONG}"""', "kids_space/m.py": f'"""m {LONG}"""'})
    assert [text[0] for text in docs("kids_z", "kids_space", "kids_a")] == ["z", "m", "a"]


def test_files_that_do_not_parse_are_skipped(installed, recwarn):
    installed(
        {
            "kids_bad/syntax.py": f'"""{LONG}"""\ndef',
            "kids_bad/nul.py": f'"""{LONG}"""\0',
            "kids_bad/coding.py": f'"""{LONG}"""\n'.encode() + b"\xff",
            "kids_bad/deep.py": f'"""{LONG}"""\nx = ' + "(" * 5000 + ")" * 5000,
            "kids_bad/latin.py": f'# coding: latin-1\n"""é {LONG}"""'.encode("latin-1"),
            "kids_bad/warns.py": f'"""warns {LONG}"""\nx = "\\d"\ny = 1 is 1\n',
        }
    )
    assert [text.split()[0] for text in docs("kids_bad")] == ["é", "warns"]
    assert not [w for w in recwarn if issubclass(w.category, SyntaxWarning | DeprecationWarning)]


def test_long_chain_of_elif(installed):
    chain = "if 0: pass\n" + "elif 0: pass\n" * 60 + f'else:\n  def f():\n    """{LONG}"""\n'
    installed({"kids_chain.py": chain})
    assert docs("kids_chain") == [LONG.strip()]


def test_processes_give_the_same_in_the_same_order(installed, monkeypatch):
    installed({f"kids_many/m{i}.py": f'"""{i} {LONG}"""' for i in range(40)})
    alone = docs("kids_many")
    monkeypatch.setattr(module, "PARALLEL_FILES", 0)
    assert docs("kids_many") == alone
    assert len(alone) == 40


def test_processes_end_with_their_parent(tmp_path):
    """Killed, it cannot tell them; Ctrl-C, which a terminal sends them too, is for it alone."""
    script, pipe = tmp_path / "parse.py", tmp_path / "pipe"
    os.mkfifo(pipe)  # in which a process waits that parses it
    script.write_text(
        "from ki_ds.corpus import documentation\n"
        "if __name__ == '__main__':\n"
        "    documentation.PARALLEL_FILES = 0\n"
        f"    list(documentation._parsed([{str(pipe)!r}]))\n"
    )
    with subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE) as parent:
        limit = time.monotonic() + 30
        while time.monotonic() < limit:
            with contextlib.suppress(OSError):  # nobody reads yet
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                break
            time.sleep(0.02)
        started = psutil.Process(parent.pid).children(recursive=True)
        assert len(started) >= 2  # one that parses, and the one that multiprocessing adds
        for process in started:
            process.send_signal(signal.SIGINT)
        still = psutil.wait_procs(started, timeout=0.3)[1]
        parent.kill()
        left = psutil.wait_procs(started, timeout=5)[1]
        os.close(writer)
        assert len(still) == len(started) and b"KeyboardInterrupt" not in parent.stderr.read()
    for process in left:
        process.kill()
    assert not left


def test_standard_library(tmp_path, monkeypatch):
    kept, pruned = f'"""kept {LONG}"""', f'"""pruned {LONG}"""'
    for name in ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "a/test"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "m.py").write_text(pruned)
    (tmp_path / "a/m.py").write_text(kept)
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text("# generated\ntopics = {'z': 'last', 'b': 'fi' 'rst'}\n")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    assert docs("stdlib") == [f"kept {LONG}".strip(), "first", "last"]


def test_topics_of_this_python_are_found():
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    assert any("assert" in topic for topic in module._topics(ast.parse(path.read_bytes())))


@pytest.mark.parametrize("name", ["torch.nn", "a-b", "", "../x", "-r"])
def test_name_that_is_no_package_name(name):
    message = refusal("json", name)
    assert message.startswith(f'"{name}" is not the name of a package')


def test_package_that_is_not_installed():
    message = refusal("kids_absent")
    assert message.endswith('"kids_absent" is not installed here; run `pip install kids_absent`')


def test_module_without_python_files():
    assert '"sys" has no Python files here' in refusal("sys")


def test_python_file_that_vanished(installed, tmp_path):
    installed({"kids_gone/a.py": ""})
    (tmp_path / "kids_gone" / "b.py").symlink_to("nothing")
    message = refusal("kids_gone")
    assert message.startswith(f"{tmp_path}/kids_gone/b.py: cannot be read: No such file or directory; ")


def test_no_file_is_left_where_a_package_is_missing(tmp_path):
    with pytest.raises(UserError, match="kids_absent"):
        write_documentation(tmp_path / "documentation.jsonl", ["json", "kids_absent"])
    assert not any(tmp_path.iterdir())
