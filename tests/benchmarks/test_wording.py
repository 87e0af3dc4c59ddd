import pytest

from benchmarks.wording import bits_name, file_name, lasting, reason, signed, some, spread


@pytest.mark.parametrize(("points", "text"), [(-0.001, "+0.00"), (-0.006, "-0.01"), (1.0, "+1.00")])
def test_gains_have_a_sign_and_zero_has_one_only(points, text):
    assert signed(points) == text


def test_bits_of_weights_come_first():
    assert bits_name(2, 4) == "W2A4"


def test_standard_deviation_is_there_where_it_is_known():
    assert spread(90.0, None) == "90.00"
    assert spread(2.0, 0.5, sign="+") == "+2.00 ± 0.50"


def test_few_names_are_all_shown():
    assert some("abc", 3) == "a, b, c"
    assert some(range(1005), 2) == "0, 1 and 1,003 more"
    assert some([], 2) == ""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("\n first\nsecond"), "first"),
        (KeyError("a"), "'a'"),
        (EOFError(), "EOFError"),
        (OSError(" "), "OSError"),
    ],
)
def test_reason_is_one_line_and_never_empty(error, text):
    assert reason(error) == text


def test_names_in_files_have_no_slash():
    assert file_name("timm/resnet18") == "timm-resnet18" and file_name("resnet18") == "resnet18"


def test_descriptions_last_without_addresses():
    assert lasting([lasting, 3]) == "[<function lasting>, 3]"
