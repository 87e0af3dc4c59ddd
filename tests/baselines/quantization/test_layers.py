from baselines.network.quantizable import QUANTIZABLE
from baselines.quantization.layers import TWINS


def test_every_quantizable_layer_has_a_twin_that_is_one_too():
    assert set(TWINS) == set(QUANTIZABLE)
    assert all(issubclass(twin, layer) for layer, twin in TWINS.items())
