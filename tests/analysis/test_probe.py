"""The probe in others' networks: what it leaves as it was, and the batches and inputs that it takes."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dnl_ext import DisentangledNonLocal2d, NonLocal2d
from dnl_ext.analysis import AttentionProbe, attention_rows, measure_model


def network(**options):
    return nn.Sequential(nn.BatchNorm2d(8), DisentangledNonLocal2d(8, **options))


@pytest.mark.parametrize("measure", ["probe", "measure_model"])
def test_every_module_keeps_its_mode(measure):
    model, images = network().train(), torch.randn(2, 8, 4, 4)
    model[0].eval()  # a norm that is frozen while others train
    before = [module.training for module in model.modules()]
    if measure == "probe":
        with AttentionProbe(model) as probe:
            probe.run([images], progress=False)
    else:
        measure_model(model, [images], progress=False)
    assert [module.training for module in model.modules()] == before and not model[0].training


def test_results_in_training_are_those_without_it():
    """Neither the statistics of batch norms nor the random numbers of dropouts see the second pass."""
    outputs, statistics = [], []
    for probed in (False, True):
        torch.manual_seed(0)
        model = network(whiten="bn", norm=None).train()
        model[1].register_module("value_drop", nn.Dropout(0.5))
        model.append(nn.Dropout(0.5))
        x = torch.randn(2, 8, 6, 6)
        if probed:
            with AttentionProbe(model):
                outputs.append(model(x))
        else:
            outputs.append(model(x))
        statistics.append({name: x.clone() for name, x in model.named_buffers()})
    assert torch.equal(*outputs)
    assert all(torch.equal(statistics[0][name], statistics[1][name]) for name in statistics[0])


@pytest.mark.parametrize(
    "second",
    [(), (torch.zeros(4).long(),), (torch.zeros(4, 5, 5).long(),), (torch.zeros(4, 5, 5).long(), torch.zeros(4))],
)
def test_what_loaders_yield(second):
    """Images alone, with classes of images, with labels of pixels, and with more."""
    loader = DataLoader(TensorDataset(torch.randn(4, 8, 5, 5), *second), batch_size=2)
    with AttentionProbe(nn.Sequential(NonLocal2d(8))) as probe:
        probe.run(loader, progress=False)
    assert len(probe.blocks["0"].images) == 4


def test_labels_of_other_images_are_refused():
    with (
        AttentionProbe(nn.Sequential(NonLocal2d(8))) as probe,
        pytest.raises(ValueError, match="labels: expected those of 2 images"),
    ):
        probe.run([(torch.randn(2, 8, 5, 5), torch.zeros(3, 5, 5).long())], progress=False)


def test_an_input_by_name():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = NonLocal2d(8)

        def forward(self, images):
            return self.block(x=images)

    with AttentionProbe(ByName()) as probe:
        probe.run([torch.randn(2, 8, 5, 5)], progress=False)
    assert len(probe.blocks["block"].images) == 2


def test_single_positions_are_left_out():
    model, large, tiny = nn.Sequential(NonLocal2d(8)), torch.randn(1, 8, 4, 4), torch.randn(1, 8, 1, 1)
    with AttentionProbe(model) as probe:
        probe.run([tiny, large], progress=False)
    assert len(probe.blocks["0"].images) == 1 and not probe.skipped
    report = measure_model(model, [tiny], progress=False)
    assert not report.layers and report.skipped == {"0": "fewer than two queries or keys"}


def test_a_layer_that_was_measured_is_not_named_as_left_out():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    report = measure_model(encoder, [torch.randn(1, 1, 16), torch.randn(1, 5, 16)], progress=False)
    assert list(report.layers) == ["self_attn"] and not report.skipped


@pytest.mark.parametrize("whiten", ["ln", "bn"])
def test_a_block_whitened_by_layers_is_whitened(whiten):
    block = DisentangledNonLocal2d(8, variant="pairwise", whiten=whiten).eval()
    assert attention_rows(block, torch.randn(1, 8, 4, 4), [(0, 0)]).joint == "pairwise"
