"""Wrong options raise, on both routes: whitening, scale, dimension; see test_errors.py."""

import math

import numpy as np
import pytest
import torch
from calls import CALLS, EVERY_CALL, attention_inputs, call, expect, public_calls

import dnl_ext
from dnl_ext import reference

SCALED = [(route, name) for route, name in EVERY_CALL if "pairwise" in name or "disentangled" in name]
scaled = pytest.mark.parametrize(("route", "name"), SCALED)


class TestOptions:
    @scaled
    @pytest.mark.parametrize("whiten", ["nln", "Channel", "", "none", "channels", "bn-like", "ln-like"])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_unknown_whiten_is_a_value_error(self, route, name, whiten, device):
        arguments = {**CALLS[route](device)[name], "whiten": whiten}
        expect(ValueError, route, name, arguments, match=rf"^whiten: expected one of .*, got '{whiten}'$")

    @scaled
    @pytest.mark.parametrize("whiten", [True, False, 1, ("channel",), torch.tensor(1.0)])
    def test_whiten_of_another_type_is_refused(self, route, name, whiten):
        arguments = {**CALLS[route]()[name], "whiten": whiten}
        wanted = (TypeError, ValueError) if route == "public" else (TypeError, ValueError, RuntimeError)
        expect(wanted, route, name, arguments, match="whiten")

    @pytest.mark.parametrize(("route", "name"), SCALED)
    @pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_scale_that_is_no_number_is_a_value_error(self, route, name, scale, device):
        arguments = {**CALLS[route](device)[name], "scale": scale}
        expect(ValueError, route, name, arguments, match=r"^scale: expected a finite number, got -?(nan|inf)")

    @pytest.mark.parametrize("name", ["disentangled_attention", "pairwise_attention", "pairwise_softmax"])
    @pytest.mark.parametrize("scale", ["0.5", True, [0.5], torch.tensor(0.5), 1j])
    def test_scale_of_another_type_is_a_type_error(self, name, scale):
        expect(TypeError, "public", name, {**public_calls()[name], "scale": scale}, match=r"^scale: expected")

    @pytest.mark.parametrize("name", ["disentangled_attention", "pairwise_attention", "pairwise_softmax"])
    @pytest.mark.parametrize("scale", [1, np.float64(0.5)])
    def test_scale_may_be_any_real_number(self, name, scale):
        actual = call("public", name, {**public_calls()[name], "scale": scale})
        assert torch.equal(actual, call("public", name, {**public_calls()[name], "scale": float(scale)}))

    @pytest.mark.parametrize("dim", ["0", None, 0.5, (0, 1)])
    def test_dim_of_another_type_is_refused(self, dim):
        with pytest.raises((TypeError, ValueError), match=r"^dim: expected"):
            dnl_ext.mean_subtract(torch.zeros(2, 3), dim)

    def test_options_are_keywords_only(self):
        x = attention_inputs()
        with pytest.raises(TypeError):
            dnl_ext.disentangled_attention(*x.values(), 0.5)
        with pytest.raises(TypeError):
            dnl_ext.pairwise_attention(x["query"], x["key"], x["value"], 0.5)
        with pytest.raises(TypeError):
            dnl_ext.pairwise_softmax(x["query"], x["key"], 0.5)

    def test_the_reference_refuses_unknown_whiten_too(self):
        x = attention_inputs()
        with pytest.raises(ValueError, match="whiten"):
            reference.disentangled_attention(*x.values(), whiten="nln")
