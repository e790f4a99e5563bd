"""The launches of a GPU's chunk (`a2sf.engine.kernels.gpu.launch`) in plain torch, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from a2sf.engine.kernels.gpu.jit import NEVER
from a2sf.engine.kernels.gpu.launch import Batch, ChunkSlots, Scanned
from a2sf.engine.priorities import SHARE


class PlainSteps:
    """The launches for one batch; in float64, so that no rounding decides."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.launched = batch, []

    def shares(self, table: Tensor, slots: ChunkSlots, n: int, N: int) -> Tensor:
        self.launched.append("shares")
        logits = self._logits(table, slots, n, N)
        came = self._born(table, N)[:, None, None, None] <= torch.arange(n)[:, None]
        logits = logits.masked_fill(~came, -torch.inf)
        return torch.exp2(logits - logits.amax(-1, keepdim=True) + 100).masked_fill(~came, 0)

    def scan(self, table: Tensor, slots: ChunkSlots, shares: Tensor, n: int, several: bool) -> Scanned:
        self.launched.append("scan")
        b, N = self.batch, slots.positions.shape[-1]
        B, K = slots.positions.shape[:2]
        row, done, held, tokens = table.long().unbind(1)
        seen, budget, recent, sinks = b.limits[row].long()[:, :, None, None].unbind(1)
        seen, a = seen + done[:, None, None], b.factor[row].double()[:, None, None]
        column, born = torch.arange(N), self._born(table, N)[:, None].expand(B, K, N)
        is_slot = (column < held[:, None])[:, None]
        position = torch.where(born < tokens[:, None, None], seen + born, -1)
        position = torch.where(is_slot, slots.positions.long(), position)
        real = position >= 0
        numbers = torch.where(is_slot[:, :, None] & real[:, :, None], slots.numbers.double(), 0)
        if b.rule.weight is not None or b.rule.bias is not None:
            new = (done[:, None] + born[:, 0]).clamp(0, b.fixed.shape[-1] - 1)
            of_new = b.fixed[row].double().gather(3, new[:, None, None].expand(B, K, 2, N))
            numbers[:, :, 2:] = torch.where(is_slot[:, :, None], numbers[:, :, 2:], of_new)
        A, age, m, bias = numbers.unbind(2)
        died = torch.where(real, NEVER, -1)
        for t in range(n):
            here = (t < tokens)[:, None, None]
            alive = real & (born <= t) & (died == NEVER)
            count = alive.sum(-1, keepdim=True)
            if b.rule.scored:
                e = shares[:, :, :, t].double().masked_fill(~alive[:, :, None], 0)
                lost = ~(e.sum(-1, keepdim=True) >= 2.0**-80)
                e = torch.where(lost, self._careful(table, slots, t, alive), e)
                p = e / e.sum(-1, keepdim=True)
                if b.rule.count_above_uniform:
                    p = (p * count[:, :, None] >= SHARE).double()
                A = torch.where(here & alive, a * A + p.sum(2), A)
            age = torch.where(here & alive, a * age + 1, age)
            priority = A / age.where(alive, 1) if b.rule.mean_over_age else A
            priority = priority * m if b.rule.weight is not None else priority
            priority = priority + bias if b.rule.bias is not None else priority
            if b.rule.shared:
                priority = priority.sum(1, keepdim=True).expand(B, K, N)
            free = alive & (position >= sinks) & (position <= seen + t - recent)
            order = torch.where(free, priority.nan_to_num(torch.inf, torch.inf, -torch.inf), torch.inf)
            order = torch.where(free, order, torch.nan).argsort(
                dim=-1, stable=True
            )  # NaN, of what stays, is sorted last
            excess = torch.where(here & (count > budget + b.spare), count - budget, 0)
            goes = torch.zeros_like(free).scatter_(2, order, column < excess)
            died = torch.where(goes, t, died)
        stays = real & (died == NEVER)
        kept = torch.where(stays, column, N).sort(-1).values
        left, at = stays.sum(-1), kept.clamp(max=N - 1)
        positions = torch.where(kept < N, position.gather(2, at), -1)
        numbers = torch.stack([A, age, m, bias], 2).gather(3, at[:, :, None].expand(B, K, 4, N)).float()
        return Scanned(positions.int(), numbers, at, left, died.int())

    def attend(self, table: Tensor, slots: ChunkSlots, died: Tensor, n: int, sums: Tensor | None = None) -> None:
        self.launched.append("attend")
        p, seen, total = self._attention(table, slots, died, n)
        row, done, _, tokens = (x.tolist() for x in table.unbind(1))
        values = self._columns(self.batch.value, slots.values, table, p.shape[-1])
        out = (p[..., None] * values[:, :, None, None].double()).where(seen[..., None], 0).sum(-2)
        for i in range(len(table)):
            part = out[i, :, :, : tokens[i]].permute(2, 0, 1, 3)
            self.batch.output[row[i], done[i] : done[i] + tokens[i]] = part.to(self.batch.output.dtype)
        if sums is not None:
            sums.copy_(total)

    def keep(self, table: Tensor, slots: ChunkSlots, scanned: Scanned, S: int) -> ChunkSlots:
        self.launched.append("keep")
        filled = torch.arange(S) < scanned.left[..., None]
        found = []
        for new, old in ((self.batch.key, slots.keys), (self.batch.value, slots.values)):
            columns = self._columns(new, old, table, scanned.kept.shape[-1])
            at = scanned.kept[:, :, :S, None].long().expand(-1, -1, -1, old.shape[-1])
            found.append(columns.gather(2, at).where(filled[..., None], 0))
        return ChunkSlots(scanned.positions, scanned.numbers, *found)

    def received(
        self, table: Tensor, slots: ChunkSlots, died: Tensor, sums: Tensor, powers: Tensor, scores: Tensor
    ) -> None:
        self.launched.append("received")
        n, S = self.batch.key.shape[1], slots.keys.shape[2]
        row, _, held, tokens = table.long().unbind(1)
        p, seen, _ = self._attention(table, slots, died, n)
        if self.batch.rule.count_above_uniform:
            p = (p * seen.sum(-1, keepdim=True) >= SHARE).double()
        back = (tokens[:, None] - 1 - torch.arange(n)).clamp(min=0)
        p = p.masked_fill((torch.arange(n) >= tokens[:, None])[:, None, None, :, None], 0)
        added = (p * powers[row].gather(1, back)[:, None, None, :, None]).sum((2, 3))
        scores *= powers[row, tokens][:, None, None]
        for i in range(len(table)):
            h, t = int(held[i]), int(tokens[i])
            scores[i, :, :h] += added[i, :, :h]
            scores[i, :, S : S + t] = added[i, :, h : h + t].float()

    def _born(self, table: Tensor, N: int) -> Tensor:
        """The step at which each column comes, [B, N]."""
        return torch.arange(N) - table[:, 2, None].long()

    def _columns(self, new: Tensor, slots: Tensor, table: Tensor, N: int) -> Tensor:
        """Keys or values of the columns, [B, K, N, D]; 0 where there is none."""
        row, done, held, tokens = table.long().unbind(1)
        out = slots.new_zeros(*slots.shape[:2], N, slots.shape[-1])
        for i, (r, d, h, t) in enumerate(zip(row.tolist(), done.tolist(), held.tolist(), tokens.tolist(), strict=True)):
            out[i, :, :h] = slots[i, :, :h]
            out[i, :, h : h + t] = new[r, d : d + t].transpose(0, 1)
        return out

    def _logits(self, table: Tensor, slots: ChunkSlots, n: int, N: int) -> Tensor:
        """[B, K, G, n, N], in powers of 2."""
        row, done = table.long().unbind(1)[:2]
        token = (done[:, None] + torch.arange(n)).clamp(max=self.batch.query.shape[1] - 1)
        query = self.batch.query[row[:, None], token].permute(0, 2, 3, 1, 4).double()
        keys = self._columns(self.batch.key, slots.keys, table, N).double()
        return query @ keys[:, :, None].transpose(-1, -2) * self.batch.scale

    def _careful(self, table: Tensor, slots: ChunkSlots, t: int, alive: Tensor) -> Tensor:
        logits = self._logits(table, slots, t + 1, alive.shape[-1])[:, :, :, t]
        logits = logits.masked_fill(~alive[:, :, None], -torch.inf)
        return torch.exp2(logits - logits.amax(-1, keepdim=True)).masked_fill(~alive[:, :, None], 0)

    def _attention(self, table: Tensor, slots: ChunkSlots, died: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Attention [B, K, G, n, columns], which columns each token sees, and log2 of the sums."""
        N = int(table[:, 2:].sum(1).max())
        end = torch.full((*died.shape[:2], N), NEVER, dtype=torch.int64)
        end[:, :, : died.shape[-1]] = died[:, :, :N]
        born, t = self._born(table, N)[:, None, None, None], torch.arange(n)[:, None]
        inside = (torch.arange(N) < table[:, 2:].sum(1)[:, None])[:, None, None, None]
        seen = ((born <= t) & (t <= end[:, :, None, None]) & inside).expand(-1, -1, self.batch.query.shape[3], -1, -1)
        logits = self._logits(table, slots, n, N).masked_fill(~seen, -torch.inf)
        total = (logits * 0.6931471805599453).logsumexp(-1) / 0.6931471805599453
        return torch.exp2(logits - total[..., None]).masked_fill(~seen, 0), seen, total
