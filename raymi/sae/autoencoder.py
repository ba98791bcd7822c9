"""What autoencoders compute, whatever file they came from.

Features are activation((normalised x - b_dec where asked) @ W_enc + b_enc), outputs features @ W_dec + b_dec. Where an
autoencoder was trained on centred activations, x is taken without its mean over the width, and gets it back at the end.

Legend: N rows (all leading dimensions flattened), D input width, O output width, F features, A active features.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from raymi.sae.description import Description
from raymi.sae.largest import top_k

ROWS = 1024
"""Rows that are encoded at a time."""
FEATURES = 8192
"""Features that are encoded at a time.

With these, `encode_sparse` of 1,024 rows by a 1M-wide autoencoder peaks 48 MiB above its weights, where the dense
activations are 4,096 MiB.
"""


@dataclass(frozen=True, slots=True)
class Sparse:
    """The active features of every row, the largest first, equal ones by index. Rows may be empty.

    Row i's are `indices[offsets[i]:offsets[i + 1]]`, and `values` likewise.
    """

    indices: Tensor
    """int64 [A]."""
    values: Tensor
    """[A]; none is zero."""
    offsets: Tensor
    """int64 [N + 1]."""
    shape: tuple[int, ...]
    """Of the dense activations: the leading dimensions of what was encoded, then F."""

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Indices and values of one row, rows counted over all leading dimensions."""
        begin, end = (int(offset) for offset in self.offsets[index : index + 2])
        return self.indices[begin:end], self.values[begin:end]

    @property
    def counts(self) -> Tensor:
        """How many features each row has: int64, the leading dimensions."""
        return self.offsets.diff().reshape(self.shape[:-1])

    @property
    def rows(self) -> Tensor:
        """The row of every active feature: int64 [A]."""
        n = len(self.offsets) - 1
        return torch.arange(n, device=self.offsets.device).repeat_interleave(self.offsets.diff())

    def dense(self) -> Tensor:
        """All activations, [..., F]."""
        flat = self.values.new_zeros(len(self.offsets) - 1, self.shape[-1])
        flat[self.rows, self.indices] = self.values
        return flat.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class _Input:
    """Rows as the encoder takes them, and what takes an output back to where they came from."""

    rows: Tensor
    """[N, D]"""
    scale: Tensor | float = 1.0
    """What outputs are multiplied with, [N, 1] or a number."""
    shift: Tensor | None = None
    """What is then added to them, [N, 1]."""


class _Workspace:
    """Where a block of activations is computed, one after the other, for a whole call.

    Blocks of their own would each be cut into by the few numbers that are kept of them, so that the heap grows by one
    block a block.
    """

    def __init__(self, rows: Tensor, d_sae: int) -> None:
        size = min(len(rows), ROWS) * min(d_sae, FEATURES)
        self._numbers = rows.new_empty(size)
        self._mask = torch.empty(size, dtype=torch.bool, device=rows.device)

    def numbers(self, rows: int, features: int) -> Tensor:
        return self._numbers[: rows * features].view(rows, features)

    def mask(self, rows: int, features: int) -> Tensor:
        return self._mask[: rows * features].view(rows, features)


class SAE:
    """A sparse autoencoder or transcoder.

    It takes activations of shape [..., D]; where it reads the heads' outputs one after the other, [..., heads, width]
    as well. Every method runs without gradients, in the autoencoder's dtype and on its device.

    Args:
        about: what it computes.
        tensors: its weights by canonical name, on the CPU; see `Description`.
        device: where it computes.
        dtype: in what it computes.
    """

    def __init__(
        self,
        about: Description,
        tensors: Mapping[str, Tensor],
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.about = about
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self._stored = tensors
        self._ready: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        about = self.about
        return f"<SAE {about.source} {about.architecture} {about.d_in}->{about.d_sae} at {about.site}>"

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """All features of activations.

        Args:
            x: [..., D].

        Returns:
            Feature activations [..., F], none of them negative.
        """
        given, lead = self._rows(x)
        out = given.rows.new_zeros(len(given.rows), self.about.d_sae)
        work = _Workspace(given.rows, self.about.d_sae)
        for begin in range(0, len(out), ROWS):
            rows, filled = given.rows[begin : begin + ROWS], out[begin : begin + ROWS]
            if self.about.k is not None:
                values, indices = self._largest(rows, self.about.k, work)
                filled.scatter_(1, indices, values)
            else:
                for first, activations in self._blocks(rows, work):
                    filled[:, first : first + activations.shape[1]] = activations
        return out.reshape(*lead, self.about.d_sae)

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> Sparse:
        """The features that are active: exactly those of `encode`, without ever holding all that are not.

        Args:
            x: [..., D].
        """
        given, lead = self._rows(x)
        work = _Workspace(given.rows, self.about.d_sae)
        blocks = range(0, len(given.rows), ROWS)
        parts = [self._active(given.rows[begin : begin + ROWS], begin, work) for begin in blocks]
        rows, indices, values = (torch.cat(part) for part in zip(*parts, strict=True)) if parts else self._nothing()
        # Features come in ascending order within a row, and both sorts keep the order of equals.
        order = values.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        counts = torch.bincount(rows, minlength=len(given.rows))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Sparse(indices[order], values[order], offsets, (*lead, self.about.d_sae))

    @torch.no_grad()
    def activations(self, x: Tensor, features: Sequence[int]) -> Tensor:
        """Some features of activations, at the cost of those features where the architecture allows it.

        Args:
            x: [..., D].
            features: M indices.

        Returns:
            [..., M], equal to `encode(x)[..., features]` but for rounding.
        """
        given, lead = self._rows(x)
        chosen = self._checked(features)
        if self.about.k is None:
            return self._activate(given.rows, chosen).reshape(*lead, len(chosen))
        found = self.encode_sparse(x)
        matches = found.indices[:, None] == chosen
        out = given.rows.new_zeros(len(given.rows), len(chosen))
        out.index_add_(0, found.rows, found.values[:, None] * matches)
        return out.reshape(*lead, len(chosen))

    @torch.no_grad()
    def decode(self, features: Tensor | Sparse, like: Tensor | None = None) -> Tensor:
        """What features stand for; a transcoder's skip connection is not in it.

        Args:
            features: [..., F], or sparse at a cost in proportion to the active ones.
            like: the activations [..., D] that were encoded: needed where the input is normalised row by row, so that
                the output can be taken back to its scale. What is centred gets the mean of these back.

        Returns:
            [..., O], heads joined.
        """
        back = self._way_back(like)
        lead = features.shape[:-1]
        if isinstance(features, Sparse):
            raw = self._decode_sparse(features)
        else:
            flat = features.to(self.device, self.dtype).reshape(-1, self.about.d_sae)
            if self.about.rescale_by_decoder_norm:
                flat = flat * (1 / self._decoder_norms)
            raw = torch.addmm(self._weight("b_dec"), flat, self._weight("W_dec"))
        out = self._denormalised(raw, back)
        if self.about.centred and like is not None and not self.about.transcoder:
            out = out + self._joined(like).reshape(-1, self.about.d_in).mean(-1, keepdim=True)
        return out.reshape(*lead, self.about.d_out)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, features: Sparse | None = None) -> Tensor:
        """Decoded features of activations, plus a transcoder's skip connection.

        Args:
            x: [..., D], or [..., heads, width] where the heads are joined.
            features: those of x, where they are known.

        Returns:
            The shape of x; for a transcoder [..., O].
        """
        out = self.decode(features or self.encode_sparse(x), like=x)
        if self.about.skip:
            out += self._seen(x) @ self._weight("W_skip").T
        return out if self.about.transcoder else out.reshape(x.shape)

    @torch.no_grad()
    def reconstruction_error(self, x: Tensor, target: Tensor | None = None) -> float:
        """Mean squared error over all elements and positions.

        Args:
            x: [..., D].
            target: what a transcoder should have predicted, [..., O]; x for an autoencoder.
        """
        target = self._target(x, target)
        error = self.reconstruct(x) - target
        return float(error.double().square().mean())

    def decoder_vector(self, feature: int) -> Tensor:
        """What one unit of a feature adds to the output, [O]."""
        return self.decoder_vectors([feature])[0]

    @torch.no_grad()
    def decoder_vectors(self, features: Sequence[int]) -> Tensor:
        """Rows of the decoder, [M, O]; only these rows reach the device.

        Raises:
            IndexError: for a feature that there is not.
        """
        chosen = self._checked(features)
        if "W_dec" in self._ready:
            rows = self._ready["W_dec"][chosen]
        else:
            rows = self._stored["W_dec"][chosen.cpu()].to(self.device, self.dtype)
        return rows / (self.about.output_scale or 1.0)

    @torch.no_grad()
    def contributions(self, features: Sequence[int], values: Tensor, like: Tensor) -> Tensor:
        """What single active features add to the output, on the model's scale: without them it is so much less.

        Args:
            features: M indices.
            values: [M], their activations.
            like: [M, D], what each was encoded from.

        Returns:
            [M, O], heads joined.
        """
        rows = self.decoder_vectors(features)
        values = values.to(rows)
        if self.about.rescale_by_decoder_norm:
            values = values / self._decoder_norms[self._checked(features)]
        back = self._way_back(like)
        # A scale that is one number is in the decoder vectors already.
        return rows * values[:, None] * (back.scale if isinstance(back.scale, Tensor) else 1.0)

    @torch.no_grad()
    def injection(self, strengths: Mapping[int, float], *, positions: Sequence[int], n_positions: int) -> Tensor:
        """What to add to the site to inject features: the sum of strength x decoder vector at the chosen positions.

        Args:
            strengths: feature -> strength.
            positions: where; negative ones count from the end.
            n_positions: how many positions there are.

        Returns:
            [n_positions, O], zero at all other positions.

        Raises:
            IndexError: for a feature or a position that there is not.
        """
        wrong = [position for position in positions if not -n_positions <= position < n_positions]
        if wrong:
            raise IndexError(f"there is no position {wrong[0]} among {n_positions}")
        vectors = self.decoder_vectors(list(strengths))
        out = vectors.new_zeros(n_positions, self.about.d_out)
        out[list(positions)] = vectors.new_tensor(list(strengths.values())) @ vectors
        return out

    @torch.no_grad()
    def splice(
        self,
        x: Tensor,
        *,
        clamp: Mapping[int, float] | None = None,
        error_term: bool = False,
        target: Tensor | None = None,
    ) -> Tensor:
        """What the model goes on with when the autoencoder stands in its way.

        Args:
            x: [..., D].
            clamp: feature -> value it is given at every position; 0 takes it out.
            error_term: whether to add what the autoencoder fails to reconstruct, so that only clamping has an effect.
                Without clamping the result is then x itself.
            target: for a transcoder with the error term, what it should have predicted, [..., O].

        Returns:
            The shape of x; for a transcoder [..., O].
        """
        base = self._target(x, target) if error_term else self.reconstruct(x)
        if not clamp:
            return base
        features = self._checked(list(clamp))
        change = base.new_tensor(list(clamp.values())) - self.activations(x, list(clamp)).reshape(-1, len(features))
        if self.about.rescale_by_decoder_norm:
            change = change / self._decoder_norms[features]
        # Decoding is affine, so what clamping changes is the change decoded, without the biases.
        return base + (change @ self._weight("W_dec")[features] * self._way_back(x).scale).reshape(base.shape)

    def _blocks(self, rows: Tensor, work: _Workspace) -> Iterator[tuple[int, Tensor]]:
        """Activations of consecutive blocks of features, before the selection of the k largest.

        Each is only there until the next is asked for.
        """
        for first in range(0, self.about.d_sae, FEATURES):
            yield first, self._activate(rows, slice(first, first + FEATURES), work)

    def _activate(self, rows: Tensor, features: slice | Tensor, work: _Workspace | None = None) -> Tensor:
        """Activations of some features, [N, M], in the workspace if there is one.

        SAELens, sparsify, dictionary_learning and Gemma Scope agree here, at negative thresholds too: a feature is
        never negative, and one exactly at its threshold is off.
        """
        encoder = self._weight("W_enc")[:, features]
        numbers = work.numbers(len(rows), encoder.shape[1]) if work else None
        mask = work.mask(len(rows), encoder.shape[1]) if work else None
        if self.about.activation == "gated":
            shared = torch.mm(rows, encoder, out=numbers)
            off = torch.le(shared, -self._weight("b_gate")[features], out=mask)
            magnitude = shared.mul_(self._weight("r_mag")[features].exp()).add_(self._weight("b_mag")[features])
            return magnitude.relu_().masked_fill_(off, 0.0)
        before = torch.addmm(self._weight("b_enc")[features], rows, encoder, out=numbers)
        if self.about.rescale_by_decoder_norm:
            before.mul_(self._decoder_norms[features])
        if self.about.activation == "jumprelu":
            off = torch.le(before, self._weight("threshold")[features], out=mask)
            return before.relu_().masked_fill_(off, 0.0)
        return before.relu_()

    def _active(self, rows: Tensor, offset: int, work: _Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """Row, feature and value of what is active, by row and feature within each block of features."""
        if self.about.k is not None:
            values, indices = self._largest(rows, self.about.k, work)
            indices, by_index = indices.sort(dim=1)
            blocks = [(indices, values.gather(1, by_index))]
        else:
            blocks = self._blocks(rows, work)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for first, activations in blocks:
            row, column = activations.nonzero(as_tuple=True)  # keeps a NaN, which is an error and never a zero
            index = first[row, column] if isinstance(first, Tensor) else column + first
            parts.append((row + offset, index, activations[row, column]))
        row, index, value = (torch.cat(part) for part in zip(*parts, strict=True))
        return row, index, value

    def _largest(self, rows: Tensor, k: int, work: _Workspace) -> tuple[Tensor, Tensor]:
        """The k largest activations of every row and their features, each [N, k], merged from blocks of features."""
        values, indices = rows.new_zeros(len(rows), 0), torch.zeros(len(rows), 0, dtype=torch.int64, device=rows.device)
        for first, activations in self._blocks(rows, work):
            more, where = top_k(activations, min(k, activations.shape[1]))
            # Those found before have lower indices and stand first, so that they win ties.
            values, order = torch.cat([values, more], 1).sort(dim=1, descending=True, stable=True)
            values, order = values[:, :k], order[:, :k]
            indices = torch.cat([indices, where + first], 1).gather(1, order)
        return values, indices

    def _decode_sparse(self, features: Sparse) -> Tensor:
        values = features.values.to(self.device, self.dtype)
        indices = features.indices.to(self.device)
        if self.about.rescale_by_decoder_norm:
            values = values * (1 / self._decoder_norms[indices])
        offsets = features.offsets[:-1].to(self.device)
        decoder = self._weight("W_dec")
        if not len(offsets):
            return decoder.new_zeros(0, self.about.d_out)
        return embedding_bag(indices, decoder, offsets, mode="sum", per_sample_weights=values) + self._weight("b_dec")

    def _rows(self, x: Tensor) -> tuple[_Input, tuple[int, ...]]:
        """Activations as rows for the encoder, and their leading dimensions."""
        joined = self._seen(x)
        given = self._normalised(joined.reshape(-1, self.about.d_in))
        if self.about.apply_b_dec_to_input:
            given = _Input(given.rows - self._weight("b_dec"), given.scale, given.shift)
        return given, tuple(joined.shape[:-1])

    def _normalised(self, rows: Tensor) -> _Input:
        """Normalises as SAELens does, which is where these ways come from."""
        match self.about.normalisation:
            case "expected_average_only_in":
                return _Input(rows * (self.about.input_scale or 1.0))
            case "constant_norm_rescale":
                factor = self.about.d_in**0.5 / rows.norm(dim=-1, keepdim=True)
                return _Input(rows * factor, 1 / factor)
            case "layer_norm":
                mean = rows.mean(dim=-1, keepdim=True)
                centred = rows - mean
                deviation = centred.std(dim=-1, keepdim=True)
                return _Input(centred / (deviation + 1e-5), deviation, mean)
            case "none":
                return _Input(rows)

    def _way_back(self, like: Tensor | None) -> _Input:
        """How outputs return to the model's scale. A transcoder's output has nothing to do with its input's norm."""
        if self.about.normalisation in ("none", "expected_average_only_in"):
            return _Input(torch.empty(0), 1 / (self.about.output_scale or 1.0))
        if self.about.transcoder:
            return _Input(torch.empty(0))
        if like is None:
            raise ValueError(f"{self!r} normalises its input row by row ({self.about.normalisation}): give `like`")
        return self._normalised(self._seen(like).reshape(-1, self.about.d_in))

    @staticmethod
    def _denormalised(raw: Tensor, back: _Input) -> Tensor:
        out = raw if isinstance(back.scale, float) and back.scale == 1.0 else raw * back.scale
        return out if back.shift is None else out + back.shift

    def _seen(self, x: Tensor) -> Tensor:
        """Activations as the encoder may see them: without their mean, where it knows none."""
        joined = self._joined(x)
        return joined - joined.mean(-1, keepdim=True) if self.about.centred else joined

    def _joined(self, x: Tensor) -> Tensor:
        """Activations in this autoencoder's dtype, with the heads one after the other where they are joined."""
        x = x.to(self.device, self.dtype)
        if x.shape[-1] == self.about.d_in:
            return x
        if self.about.heads_joined and x.dim() > 1 and x.shape[-1] * x.shape[-2] == self.about.d_in:
            return x.flatten(-2)
        raise ValueError(f"{self!r} takes activations of width {self.about.d_in}, not of shape {list(x.shape)}")

    def _target(self, x: Tensor, target: Tensor | None) -> Tensor:
        if target is None and self.about.transcoder:
            raise ValueError(f"{self!r} is a transcoder: give what it should predict as `target`")
        return (x if target is None else target).to(self.device, self.dtype)

    def _checked(self, features: Collection[int]) -> Tensor:
        wrong = [feature for feature in features if not 0 <= feature < self.about.d_sae]
        if wrong:
            raise IndexError(f"there is no feature {wrong[0]} in {self!r}")
        return torch.tensor(list(features), dtype=torch.int64, device=self.device)

    def _weight(self, name: str) -> Tensor:
        if name not in self._ready:
            tensor = self._stored[name].to(self.device, self.dtype)
            # Some formats store the decoder the other way round: its rows are gathered, one cache miss per number.
            self._ready[name] = tensor.contiguous() if name == "W_dec" else tensor
        return self._ready[name]

    @cached_property
    def _decoder_norms(self) -> Tensor:
        return self._weight("W_dec").norm(dim=-1)

    def _nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        return none, none, torch.zeros(0, dtype=self.dtype, device=self.device)
