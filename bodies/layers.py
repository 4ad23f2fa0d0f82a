"""The body g of slide 7: the layers of a pretrained model, as the methods call them.

Everything that differs from one kind of body to the next, once it is loaded, is here: also what f^t
takes over of the body's own embedder, and what h^t is put together from.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# B batch, N patches, D width, h x w patches of an image, P tokens of a ViT before its patches


def first_position(net: nn.Module) -> int:
    """The row of a series body's table of positions that belongs to the first token.

    0 in a BERT; padding_idx + 1 in a RoBERTa, whose earlier rows are never used.
    """
    return getattr(net.embeddings, "padding_idx", -1) + 1


def patch_length(L: int, most: int) -> int:
    """ORCA's rule: the smallest length that divides L and gives at most `most` patches.

    Where that is more than twice the length needed (a prime L, say), the series is padded instead.
    """
    need = math.ceil(L / most)
    exact = next(p for p in range(need, L + 1) if L % p == 0)
    return exact if exact <= 2 * need else need


def image_size(net: nn.Module) -> int:
    """Pixels along each side of the images that an image body takes; 0 of a series body."""
    return net.patch_embed.img_size[0] if hasattr(net, "patch_embed") else 0


def copy_channels(own: nn.Conv2d, conv: nn.Conv2d) -> None:
    """Let a convolution of C channels start as the body's own: its three channels are repeated."""
    C = conv.in_channels
    weight = own.weight.detach().repeat(1, math.ceil(C / 3), 1, 1)[:, :C]
    conv.weight.data = weight.contiguous()
    nn.init.zeros_(conv.bias)
    if own.bias is not None:
        conv.bias.data = own.bias.detach().clone()


def norm_and_positions(
    net: nn.Module, grid: tuple, init: str = "body"
) -> tuple[nn.Module, nn.Parameter | None]:
    """Copies of what follows the convolution in the body's own embedder.

    Args:
        grid: the number of patches along each axis, N in all.
        init: "body", or "random": a new LayerNorm, and positions from random numbers.
    Returns: the norm; the positions, (N, D), or None of a Swin, which has relative ones in g.
    Raises: ValueError if a series has more patches than the body has positions.
    """
    N, position = math.prod(grid), None
    if hasattr(net, "embeddings"):
        norm, table = net.embeddings.LayerNorm, net.embeddings.position_embeddings.weight
        position = table[first_position(net) :][:N]
        if N > len(position):
            raise ValueError(f"--patches: {N} patches exceed the body's {len(position)} positions")
    else:
        norm = net.patch_embed.norm
        if hasattr(net, "pos_embed"):
            position = net.pos_embed[0, -N:]  # the class token has the first of them
    norm = copy.deepcopy(norm)
    if position is not None:
        position = nn.Parameter(position.detach().clone())
    if init == "random":
        if isinstance(norm, nn.LayerNorm):
            norm.reset_parameters()
        if position is not None:
            nn.init.normal_(position, std=0.02)
    return norm, position


def adapt(net: nn.Module, grid: tuple) -> nn.Module:
    """Make g of a body: from tokens (B, N, D) to a list of what each of its layers returns.

    `grid` is the number of patches along each axis. The attribute maps of g says of each layer: the
    patches along each axis, and their width. With recompute = True, layers are computed again in
    the backward pass, which saves memory.
    """
    if hasattr(net, "encoder"):
        return SeriesBody(net, grid)
    return (ImageBody if hasattr(net, "layers") else PlainBody)(net, grid)


def _through(layer: nn.Module, z: Tensor, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, z, use_reentrant=False)
    return layer(z)


class SeriesBody(nn.Module):
    """g: the layers of a RoBERTa or BERT, (B, N, D) -> [(B, N, D), ...], one map per layer."""

    recompute = False

    def __init__(self, net: nn.Module, grid: tuple):
        super().__init__()
        self.encoder = net.encoder
        self.maps = [(grid, net.config.hidden_size)] * len(self.encoder.layer)

    def forward(self, z: Tensor) -> list[Tensor]:
        features = []
        for layer in self.encoder.layer:
            z = _through(layer, z, self.recompute)
            features.append(z)
        return features


class ImageBody(nn.Module):
    """g: the stages of a Swin transformer, (B, N, D) -> [(B, h, w, D), (B, h/2, w/2, 2D), ...]."""

    recompute = False

    def __init__(self, swin: nn.Module, grid: tuple):
        super().__init__()
        self.layers, self.norm, self.grid = swin.layers, swin.norm, grid
        scales = [(i["num_chs"], i["reduction"]) for i in swin.feature_info]
        size = swin.patch_embed.img_size
        self.maps = [((size[0] // r, size[1] // r), D) for D, r in scales]

    def forward(self, z: Tensor) -> list[Tensor]:
        z, features = z.unflatten(1, self.grid), []  # (B, N, D) -> (B, h, w, D)
        for layer in self.layers:
            z = _through(layer, z, self.recompute)
            features.append(z)
        return [*features[:-1], self.norm(z)]


class PlainBody(nn.Module):
    """g: the blocks of a ViT, (B, N, D) -> [(B, h, w, D), ...], one map per block."""

    recompute = False

    def __init__(self, vit: nn.Module, grid: tuple):
        super().__init__()
        self.blocks, self.first, self.grid = vit.blocks, vit.norm_pre, grid
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
        names = ("cls_token", "dist_token", "reg_token")  # in timm's order
        tokens = [t for t in (getattr(vit, name, None) for name in names) if t is not None]
        prefix = torch.cat(tokens, dim=1).detach() if tokens else torch.zeros(1, 0, vit.embed_dim)
        own = vit.pos_embed.detach()[:, : -math.prod(grid)]  # the positions of the prefix, or none
        prefix[:, : own.shape[1]] += own
        self.prefix = nn.Parameter(prefix)  # (1, P, D)
        self.maps = [(grid, vit.embed_dim)] * len(self.blocks)

    def forward(self, z: Tensor) -> list[Tensor]:
        P, features = self.prefix.shape[1], []
        z = self.first(torch.cat([self.prefix.expand(len(z), -1, -1), z], dim=1))
        for block in self.blocks:
            z = _through(block, z, self.recompute)
            features.append(z[:, P:].unflatten(1, self.grid))  # (B, P + N, D) -> (B, h, w, D)
        return [*features[:-1], self.norm(features[-1])]


# ---- What h^t is put together from ----


def normed_linear(D: int, d: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, d))


def zeros(module: nn.Module) -> nn.Module:
    """The module with zeros in its linear layers: training then starts from the mean of y."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return module


def tile_sides(maps: list, size: tuple) -> list[int]:
    """For each stage of g, the points along each side of the tile that one of its patches predicts.

    Tiles of all stages cover the same picture, of at least `size` = (H, W) points. maps: as of g.
    """
    fine = maps[0][0]
    points = max(math.ceil(p / n) for p, n in zip(size, fine, strict=True))
    return [points * fine[0] // grid[0] for grid, _ in maps]


# ---- Frozen queries and keys, as PaRe was published on Darcy flow ----


def freeze_queries_and_keys(g: nn.Module) -> None:
    """Fix the query and key projections of every attention in g, in place; values still learn.

    Call it before the optimizer is made. State dicts keep their names and shapes.
    Source: PaRe's released configuration of Darcy flow ("Wv").
    """
    for module in list(g.modules()):
        if hasattr(module, "qkv"):  # timm: one layer for all three
            module.qkv = ValueLinear(module.qkv)
        elif hasattr(module, "query"):
            module.query.requires_grad_(False)
            module.key.requires_grad_(False)


class ValueLinear(nn.Module):
    """A linear layer (..., D) -> (..., 3 D) for queries, keys and values; only the values learn.

    The rows of queries and keys are buffers, so that no optimizer sees them: masked gradients would
    not keep them from weight decay. In a state dict, weight and bias are whole, as nn.Linear's.
    """

    def __init__(self, qkv: nn.Linear):
        super().__init__()
        D = qkv.out_features // 3
        for name in ("weight", "bias"):
            fixed = own = None
            if getattr(qkv, name) is not None:
                fixed, own = getattr(qkv, name).detach().clone().split([2 * D, D])
                own = nn.Parameter(own.clone())
            self.register_buffer(f"fixed_{name}", fixed, persistent=False)
            self.register_parameter(name, own)
        self.register_state_dict_post_hook(_join)
        self.register_load_state_dict_pre_hook(_split)

    def forward(self, z: Tensor) -> Tensor:
        weight, bias = torch.cat([self.fixed_weight, self.weight]), self.bias
        if bias is not None:
            bias = torch.cat([self.fixed_bias, bias])
        return F.linear(z, weight, bias)


def _join(module: ValueLinear, state: dict, prefix: str, *_) -> None:
    """Put the fixed rows before those that learn, in a state dict that is made."""
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            fixed, own = getattr(module, f"fixed_{name}"), state[prefix + name]
            state[prefix + name] = torch.cat([fixed, own])


def _split(module: ValueLinear, state: dict, prefix: str, *_) -> None:
    """Take the fixed rows out of a state dict that is loaded."""
    for name in ("weight", "bias"):
        if prefix + name in state:
            fixed = getattr(module, f"fixed_{name}")
            rows, state[prefix + name] = state[prefix + name].split([len(fixed), len(fixed) // 2])
            fixed.copy_(rows)
