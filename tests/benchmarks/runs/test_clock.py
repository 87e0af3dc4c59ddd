import time

from benchmarks.runs.clock import clock


def test_waiting_costs_the_processor_nothing():
    before = clock("cpu"), clock("cuda")
    time.sleep(0.2)
    of_processor, of_wall = clock("cpu") - before[0], clock("cuda") - before[1]
    assert of_processor < 0.1 < 0.2 <= of_wall


def test_work_counts():
    before = clock("cpu")
    while clock("cpu") == before:
        sum(range(1000))
