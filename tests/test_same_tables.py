"What `same_tables` calls the same."
import pytest

import same_tables


def run(folder, **tables):
    "A run folder with these tables."
    (folder/"tables").mkdir(parents=True)
    for name, text in tables.items(): (folder/"tables"/f"{name}.csv").write_bytes(text.encode())
    return str(folder)


def test_the_same(tmp_path, capsys):
    old = run(tmp_path/"old", main="a,b\n1,2\n", crosscoder_planted="x\n")
    new = run(tmp_path/"new", main="a,b\n1,2\n")
    assert same_tables.main([old, new]) == 0
    said = capsys.readouterr().out
    assert "gone on purpose: crosscoder_planted" in said and "1 tables are the same, 0 are not" in said


@pytest.mark.parametrize("name, text, says", [
    ("main", "a,b\n1,3\n", "differs: main, line 2\n    old 1,2\n    new 1,3"),
    ("main", "a,b\r\n1,2\r\n", "differs: main, line 1"),
    ("main", "a,b\n1,2", "differs: main, line 3\n    old \n    new (no such line)"),
    ("other", "a,b\n1,2\n", "missing: main\nnew: other"),
])
def test_not_the_same(tmp_path, capsys, name, text, says):
    old, new = run(tmp_path/"old", main="a,b\n1,2\n"), run(tmp_path/"new", **{name: text})
    assert same_tables.main([old, new]) == 1
    said = capsys.readouterr().out
    assert says in said and "0 tables are the same" in said


def test_a_run_without_tables_is_refused(tmp_path):
    old = run(tmp_path/"old", main="a\n")
    with pytest.raises(SystemExit, match="no tables"): same_tables.main([old, str(tmp_path/"nothing")])
