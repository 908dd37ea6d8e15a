"""Results of the benchmarks that are saved row by row."""

from benchmarks.rows import appended, finished


def test_a_file_that_an_interrupted_run_left_empty_is_continued(tmp_path):
    output = tmp_path / "rows.csv"
    output.touch()
    assert finished(output, ["model"]) == set()
    with appended(output, ["model", "score"]):
        # A run that is killed now leaves the header.
        assert output.read_text() == "model,score\n"
    with appended(output, ["model", "score"]) as add:
        add({"model": "Duo", "score": "1"})
    assert output.read_text().splitlines() == ["model,score", "Duo,1"]
    assert finished(output, ["model"]) == {("Duo",)}
