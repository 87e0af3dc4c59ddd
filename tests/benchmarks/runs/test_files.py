from benchmarks.runs.files import digest_text, write_text


def test_text_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "folder" / "file.txt", "first\nsecond ±\n")
    assert (tmp_path / "folder" / "file.txt").read_bytes() == "first\nsecond ±\n".encode()


def test_digests_of_text_tell_apart():
    assert digest_text("ab", "c") != digest_text("a", "bc")
