"""The training loop of LocFT-BF: Adam on one module, breadth-first or depth-first over batches of packed samples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit import parallel
from fastedit.methods.base import LIKELY
from fastedit.methods.locft_bf.adam import Adam, linear_maps, smaller_in_parts, with_kernel
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.locft_bf.not_finite import not_finite
from fastedit.methods.locft_bf.passes import Passes
from fastedit.methods.locft_bf.training_set import TrainingSet
from fastedit.methods.saved_run import SavedRun, State
from fastedit.models import PrefixCache, in_passes, pass_tokens
from fastedit.progress import LEARNED
from fastedit.statistics.store import StatisticsStore
from fastedit.weights import Snapshot

_HELD = 0.5  # share of the epochs in which the tokens before the subjects run without the update, once for all
_LONG = 10  # epochs of which a forward pass of all edits is a few percent
_MASTER = "master "  # before the path of a weight, in a saved state
_NEAR = 0.05  # nats: a batch is skipped only if its anchors diverge by less
_NEWS = 2.0  # seconds between two reports within a longer epoch
_REST = 2  # epochs that an edit sits out when its loss is first below `focus`


class Rests:
    """The epochs that learned samples sit out: each time twice as many as before, while they stay learned.

    All of them are trained on again in one of the last epochs, because others may have undone them.

    Attributes:
        wakes: [S] int64, the epoch in which each sample is trained on again.
        rests: [S] int64, how many epochs it will then sit out.
    """

    def __init__(self, n: int, epochs: int) -> None:
        self.wakes, self.rests = torch.zeros(n, dtype=torch.int64), torch.full((n,), _REST)
        self._longest = max(8, epochs // 5)
        self._last = epochs - _REST  # the last epoch to which a rest may be stretched

    def awake(self, select: Tensor, epoch: int) -> Tensor:
        """Those of the selected samples [N] that take part in an epoch; all of them if none would."""
        awake = select[self.wakes[select] <= epoch]
        return awake if len(awake) else select

    def note(self, samples: Tensor, learned: Tensor, epoch: int) -> None:
        """Note which samples [N] were learned [N] in an epoch."""
        rested, shortest = samples[learned], epoch + 1 + _REST
        self.wakes[rested] = (epoch + 1 + self.rests[rested]).clamp(max=max(shortest, self._last))
        self.rests[rested] = (2 * self.rests[rested]).clamp(max=self._longest)
        self.rests[samples[~learned]] = _REST


class Trainer:
    """The training loop; holds the original weights, the fp32 master weights and the results so far.

    `modules` are the edited modules by block, ascending; `statistics` are of their inputs, if training avoids the
    directions that these usually take.

    `saved` keeps the state of the run on disk, None if it is not kept.

    `whole` is the last complete state, with `keep_partial`: its name, the weights, losses and `learned`.
    """

    def __init__(
        self,
        data: TrainingSet,
        modules: Mapping[int, nn.Module],
        config: LocFTBFConfig,
        statistics: StatisticsStore | None = None,
        saved: SavedRun | None = None,
    ) -> None:
        self.statistics, self.saved = statistics, saved
        self.data, self.modules, self.config = data, modules, config
        assert config.epochs is not None  # chosen by now
        self.epochs = config.epochs
        self.topology, self.samples = data.batch.model.topology, data.samples
        topology, samples = self.topology, self.samples
        paths = {id(p): path for path, p in topology.model.named_parameters()}
        # a bias would change the output for all inputs, whatever their direction or token
        parameters = self.parameters = {
            paths[id(p)]: p
            for module in modules.values()
            for p in ([module.get_parameter("weight")] if config.linear_only else module.parameters())
        }
        self.originals = Snapshot(parameters)
        self.masters = {
            path: p.detach() if p.dtype == torch.float32 else p.detach().float() for path, p in parameters.items()
        }
        # factor of the losses: gradients of the mean would be too small for fp16
        fp16 = next(iter(parameters.values())).dtype == torch.float16
        self.scale = 2.0 ** int(config.batch_size).bit_length() if fp16 else 1.0
        self.losses: list[float] = []
        self.learned: list[int] = []  # number of learned edits, for each of the losses
        self.whole: tuple[str, dict[str, Tensor], list[float], list[int]] | None = None
        tokens = float(samples.lengths.float().mean()) * int(config.batch_size)
        self.maps = linear_maps(topology.model, parameters)  # for few tokens: forming gradients is cheap
        if data.trained is None and parallel.world() > 1:
            self.maps = smaller_in_parts(self.maps, int(tokens))
        elif data.trained is None:
            self.maps = with_kernel(topology.model, parameters, int(tokens))
        self.passes = Passes(data, modules, config)
        self.state: State | None = None  # in which a run that was cut off goes on
        self.generator = torch.Generator().manual_seed(config.seed)

    def run(self, cache: PrefixCache) -> None:
        self.state = self.saved.newest() if self.saved is not None else None
        # a run that continues keeps what it kept before, for the same bits
        kept = None if self.state is None else self.state[1]["kept"]
        self.passes.cache = cache
        with self.passes.prepared(self.maps, self.statistics, epochs=self.epochs, kept=kept):
            self._run()

    def _run(self) -> None:
        everything, progress = torch.arange(self.data.anchors.first), self.data.batch.progress
        if self.config.schedule == "breadth-first":
            for loss in self._epochs(everything, saved=self.saved):
                self.losses.append(loss)
                self.learned.append(self._n_learned())
                self._keep(f"of epoch {len(self.losses)}")
                progress("train", len(self.losses), self.epochs, loss)
                progress(LEARNED, self.learned[-1], len(self.data.batch))
            return
        tensors, metadata = self._resumed() or ({}, {"batches": 0, "done": 0, "total": 0.0})
        order = tensors["order"] if tensors else self._order(everything)
        batches = order.split(int(self.config.batch_size))  # depth-first: each batch by itself, one after the other
        done, total = metadata["done"], metadata["total"]
        for i, batch in enumerate(batches[metadata["batches"] :], metadata["batches"] + 1):
            place = f"batch {i} of {len(batches)}"
            *_, loss = self._epochs(batch, place)
            done, total = done + len(batch), total + loss * len(batch)
            self.losses, self.learned = [total / done], [self._n_learned()]
            self._keep(f"after {place}")
            progress("train", done, len(order), loss)
            progress(LEARNED, self.learned[-1], len(self.data.batch))
            self._save({"order": order}, {"batches": i, "done": done, "total": total})

    def _save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write the state of the run, if it is time."""
        if self.saved is None or not self.saved.due:
            return
        state = {f"{_MASTER}{path}": master for path, master in self.masters.items()}
        state |= {"generator": self.generator.get_state(), "loss of each": self.passes.loss_of, **tensors}
        metadata = {"losses": self.losses, "learned": self.learned, "kept": self.passes.kept, **metadata}
        self.saved.replace(state, metadata)

    @torch.no_grad()
    def _resumed(self) -> State | None:
        """The saved state, if there is one; the weights and results are restored from it."""
        state, self.state = self.state, None  # its tensors are not needed twice
        if state is None:
            return None
        tensors, metadata = state
        for path, master in self.masters.items():
            master.copy_(tensors[_MASTER + path])
            self.parameters[path].copy_(master)
        self.generator.set_state(tensors["generator"])
        self.passes.loss_of.copy_(tensors["loss of each"])
        self.losses, self.learned = metadata["losses"], metadata["learned"]
        return tensors, metadata

    def _keep(self, what: str) -> None:
        if self.config.keep_partial:
            masters = {path: m.clone() for path, m in self.masters.items()}
            self.whole = (what, masters, [*self.losses], [*self.learned])

    def go_back(self) -> str:
        """Go back to the last complete state, and return its name."""
        assert self.whole is not None
        what, self.masters, self.losses, self.learned = self.whole
        return what

    def _n_learned(self) -> int:
        """How many edits were learned when their loss was last computed."""
        return int((self.passes.loss_of[: len(self.data.batch)] <= -math.log(LIKELY)).sum())

    def _order(self, select: Tensor) -> Tensor:
        return select[torch.randperm(len(select), generator=self.generator)] if self.config.shuffle else select

    def _epochs(self, select: Tensor, place: str = "", saved: SavedRun | None = None) -> Iterator[float]:
        """Train on the selected samples until an epoch's mean loss is below `stop_loss`; yields each epoch's mean.

        `place` names `select` in messages if it is a single batch, so that every epoch is one step. With `saved`,
        training continues from the saved state, and keeps its own there.
        """
        config, focus = self.config, self.config.focus
        optimizer = Adam(
            self.parameters,
            self.masters,
            self.maps,
            self.passes.gradients,
            lr=config.lr or 0.0,
            weight_decay=config.weight_decay,
            scale=self.scale,
            backend="triton" if self.data.trained is None and parallel.world() == 1 else "auto",
        )
        rests = Rests(len(self.samples), self.epochs)
        begun: Tensor | None = None  # order of an epoch that was saved unfinished; then its losses and finished batches
        losses, done, first = torch.empty(0), 0, 1
        if saved is not None and (state := self._resumed()) is not None:
            tensors, metadata = state
            optimizer.load(tensors)
            rests.wakes, rests.rests = tensors["wakes"], tensors["rests"]
            begun, losses = tensors["order"], tensors["epoch's losses"]
            done, first = metadata["done"], metadata["epoch"]
        for epoch in range(first, self.epochs + 1):
            if epoch > _HELD * self.epochs:
                self.passes.release()
            order = self._order(rests.awake(select, epoch)) if begun is None else begun
            batches = order.split(int(config.batch_size))
            losses_now = torch.empty(len(batches), dtype=torch.float32, device=self.topology.device)
            losses_now[:done] = losses[:done]
            told = time.monotonic()
            for i in range(done, len(batches)):
                if i + 1 < len(batches):
                    self.passes.cache.ahead(batches[i + 1])
                if config.lr_schedule == "linear":
                    optimizer.lr = (config.lr or 0.0) * (1 - (epoch - 1 + i / len(batches)) / self.epochs)
                self._step(batches[i], optimizer, losses_now[i])
                if not place and time.monotonic() - told > _NEWS:
                    told, share = time.monotonic(), sum(map(len, batches[: i + 1])) / len(order)
                    self.data.batch.progress(
                        "epoch", round((epoch - 1 + share) * len(select)), self.epochs * len(select)
                    )
                if saved is not None:
                    tensors = {"order": order, "epoch's losses": losses_now, **optimizer.state()}
                    self._save(tensors | {"wakes": rests.wakes, "rests": rests.rests}, {"epoch": epoch, "done": i + 1})
            begun, done = None, 0
            losses_now = losses_now.cpu()  # the one synchronization of the epoch
            self._require_finite(losses_now, batches, f"{place}, step {epoch}" if place else f"epoch {epoch}")
            sizes = torch.tensor([len(batch) for batch in batches])
            mean = float((losses_now * sizes).sum() / sizes.sum())
            if focus:
                each = self.passes.loss_of.cpu()
                looked = torch.cat(list(batches))
                rests.note(looked, each[looked] < focus, epoch)
                mean = float(each[select].mean())
            yield mean
            if mean < config.stop_loss or (focus and len(looked) == len(select) and each[select].max() < focus):
                if not self.passes.holds:
                    break
                self.passes.release()
                rests = Rests(len(self.samples), self.epochs)  # look at all again, as in the edited model

    def _require_finite(self, losses: Tensor, batches: Sequence[Tensor], when: str) -> None:
        """Restore the model and raise EditError unless the loss of every batch is finite; says when that was."""
        if losses.isfinite().all():
            return
        i = int((~losses.isfinite()).nonzero()[0])
        self.originals.restore()
        when += f", batch {i + 1} of {len(batches)}" if len(batches) > 1 else ""
        raise not_finite(self.data, when, batches[i], self.config.lr)

    def _step(self, batch: Tensor, optimizer: Adam, loss_out: Tensor) -> None:
        config, topology = self.config, self.topology
        owners = [self.data.owner[i] for i in batch.tolist()]
        anchors = self.data.anchors.draw(owners, self.generator)  # [K]
        n_targets = (self.samples.lengths - self.samples.target_start)[batch].float()
        weights = self.scale / (
            n_targets * len(batch) if config.loss_average == "sample" else n_targets.sum().expand(len(batch))
        )
        weight_of_anchor = self.scale * config.anchor_weight / len(batch)
        mine = slice(parallel.rank(), None, parallel.world())  # everything, if there is one process
        whole, batch, anchors, weights = batch, batch[mine], anchors[mine], weights[mine]
        chosen, n = torch.cat([batch, self.data.anchors.first + anchors]), len(batch)
        weights = torch.cat([weights, weights.new_full((len(anchors),), weight_of_anchor)])
        loss, apart = torch.zeros_like(loss_out), torch.zeros_like(loss_out)
        for in_pass in in_passes(self.samples.lengths[chosen], pass_tokens(topology.device)):
            anchors_here = anchors[max(0, in_pass.start - n) : max(0, in_pass.stop - n)]
            row_losses = self.passes.run(
                chosen[in_pass], weights[in_pass], anchors_here.to(topology.device, non_blocking=True)
            )
            loss += row_losses[: len(row_losses) - len(anchors_here)].sum()
            apart += row_losses[len(row_losses) - len(anchors_here) :].sum()
            optimizer.gather()
        if parallel.world() > 1:
            self._share_losses(whole, loss, apart)
        loss_out.copy_(loss.div_(self.scale))
        skip = loss < config.skip_loss
        if config.focus:
            skip |= (self.passes.loss_of[whole.to(loss.device, non_blocking=True)] < config.focus).all()
        skip &= apart < self.scale * config.anchor_weight * _NEAR
        if loss.is_cuda:  # skip the step on the device, so that the host does not wait for the loss
            optimizer.step(skip.float())
        elif skip:
            optimizer.clear()
        else:
            optimizer.step()

    def _share_losses(self, batch: Tensor, loss: Tensor, apart: Tensor) -> None:
        """Sum two losses over all processes, and collect the loss of each sample of the batch.

        All processes add in the same order, so that they decide alike.
        """
        mine = self.passes.loss_of[batch[parallel.rank() :: parallel.world()].to(loss.device)]
        parts = parallel.gathered((float(loss), float(apart), mine.cpu()))
        loss.fill_(sum(part for part, _, _ in parts))
        apart.fill_(sum(part for _, part, _ in parts))
        for number, (_, _, each) in enumerate(parts):
            self.passes.loss_of[batch[number :: parallel.world()].to(loss.device)] = each.to(loss.device)

    @property
    def looks_cheap(self) -> bool:
        """Whether `look`, a forward pass of all edits by every process, is little beside the training."""
        epochs = len(self.losses) if self.config.schedule == "breadth-first" else self.epochs
        return epochs >= _LONG * parallel.world()

    @torch.no_grad()
    def look(self) -> None:
        """Compute the loss of every edit with the weights that the model has now; it was that before its last step."""
        edits, none = torch.arange(len(self.data.batch)), torch.arange(0, device=self.passes.loss_of.device)
        for in_pass in in_passes(self.samples.lengths[edits], pass_tokens(self.topology.device)):
            self.passes.run(edits[in_pass], torch.ones(len(in_pass)), none)
        if self.learned:
            self.learned[-1] = self._n_learned()
            self.data.batch.progress(LEARNED, self.learned[-1], len(self.data.batch))

    @torch.no_grad()
    def updates(self) -> dict[str, Tensor]:
        """The fp32 additive updates; afterwards the model holds exactly original + update."""
        updates = {path: self.masters[path] - before.float() for path, before in self.originals.values.items()}
        paths = {id(p): path for path, p in self.parameters.items()}
        for layer, null_space in self.passes.null_spaces.items():
            module, path = self.modules[layer], paths[id(self.modules[layer].get_parameter("weight"))]
            D = updates[path].T if isinstance(module, Conv1D) else updates[path]  # [h, d]
            D = null_space.of_rows(D)
            updates[path] = D.T.contiguous() if isinstance(module, Conv1D) else D
        for path, parameter in self.parameters.items():
            parameter.copy_(self.originals.values[path].float() + updates[path])
        return updates
