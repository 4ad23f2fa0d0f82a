"""How much of x can be read from f^t(x): the measure, and what it is of."""

from types import SimpleNamespace

import pytest
import torch
from test_results import script
from torch import nn
from torch.nn import functional as F

import bodies
import orca


@pytest.mark.parametrize(("x_shape", "patches"), [((2, 45), 16), ((5, 20, 20), 64)])
def test_patches_are_what_the_convolution_sees(x_shape, patches):
    net, _ = bodies.load_body(bodies.TINY[len(x_shape)], x_shape, patches)
    embedder = orca.SeriesEmbedder if len(x_shape) == 2 else orca.ImageEmbedder
    f_t = embedder(x_shape, net, patches)
    f_t.mean, f_t.std = f_t.mean + 0.5, f_t.std * 2
    p = script("lost").patches(f_t, x := torch.randn(3, *x_shape))
    z = f_t.norm(F.linear(p, f_t.conv.weight.flatten(1), f_t.conv.bias))
    torch.testing.assert_close(z if f_t.position is None else z + f_t.position, f_t(x))


@pytest.mark.parametrize(("weight", "want"), [(2.0, 0.0), (0.0, 1.0)])
def test_what_is_lost_is_nothing_for_an_invertible_map_and_all_for_a_constant(weight, want):
    conv = SimpleNamespace(kernel_size=(2, 2), stride=(2, 2))

    class Embedder(nn.Module):
        mean, std, size, position = 1.0, 3.0, (8, 8), None

        def forward(self, x):
            p = F.unfold((x - self.mean) / self.std, 2, stride=2).transpose(1, 2)
            return 0.3 + weight * p.flip(-1)

    f_t = Embedder()
    f_t.conv = conv
    train, held_out = torch.randn(40, 1, 8, 8), torch.randn(30, 1, 8, 8)
    found = script("lost").lost(f_t, train, held_out)
    assert found == pytest.approx(want, abs=0.01)


def test_half_of_what_an_embedding_does_not_hold_is_lost():
    class Embedder(nn.Module):
        mean, std, patch, position = 0.0, 1.0, 2, None

        def forward(self, x):  # of each pair of values the first
            return x.unflatten(2, (-1, 2)).transpose(1, 2)[..., :1].flatten(2)

    make = torch.Generator().manual_seed(0)
    train, held_out = (torch.randn(200, 1, 20, generator=make) for _ in range(2))
    assert script("lost").lost(Embedder(), train, held_out) == pytest.approx(0.5, abs=0.03)


def test_what_is_large_beside_the_bias_loses_its_length():
    lost, found = script("lost"), []
    net, _ = bodies.load_body(bodies.TINY[2], (1, 64), 16)
    f_t, x = orca.SeriesEmbedder((1, 64), net, 16), 2 + 3 * torch.randn(50, 1, 64)
    f_t.mean, f_t.std = f_t.mean + 2, f_t.std * 3
    for bias in (100, 1, 0.01):
        f_t.conv.bias.data = bias * torch.randn(len(f_t.conv.bias))
        found.append((lost.gain(f_t, x), lost.doubled(f_t, x)))
    (gain_0, moved_0), (gain_1, _), (gain_2, moved_2) = found
    assert gain_0 < 0.1 < gain_1 < 10 < gain_2
    assert moved_0 == pytest.approx(1, abs=0.1) and moved_2 < 0.05  # linear; of one length


def test_a_row_has_both_shares_and_is_not_made_twice(tmp_path, monkeypatch):
    lost, calls = script("lost"), []
    row = {"task": "darcy", "seed": 1, "align_lr": 1e-4, "lost_before": 0.1}
    monkeypatch.setattr(lost, "measure", lambda *given: calls.append(given) or row)
    for _ in range(2):
        lost.main(["--tasks", "darcy", "--seeds", "1", "--csv", str(tmp_path / "lost.csv")])
    assert calls == [("darcy", 1, 1e-4)] and (tmp_path / "lost.csv").read_text().count("\n") == 2


def test_measured_on_a_task(monkeypatch, capsys):
    lost = script("lost")
    monkeypatch.setitem(lost.all_tasks.SIZE, "satellite", 96)
    monkeypatch.setattr(lost.all_tasks, "ALIGN", "--align-samples 64 --align-epochs 1 --align")
    row = lost.measure("satellite", 0, 1e-3)
    assert 0 < row["lost_before"] < row["lost_after"] < 1 and row["align"] == "otdd"
    assert row["gain_before"] != row["gain_after"] and row["doubled_before"] > 0
    assert capsys.readouterr().out == ""
