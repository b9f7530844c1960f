"""Train the model of the fact world: `python -m fastedit.demo.train --output DIR`.

A Llama with 8 blocks learns the next token of every position of the documents. In most documents the tokens after
a subject may attend only to its last token, and only from block `--read-from` on. So the fact has to be read from the
subject's last token after the early blocks, as in large models (Meng et al. 2022, section 2). Without this constraint
small models read it in block 0 or 1.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastedit.demo.world import FIRST_PEOPLE, Draw, Span, World

BOS, EOS, PAD = 0, 1, 2
ROW = 128
REPORT_EVERY = 200


def train_tokenizer(world: World, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the world's own documents."""
    documents = world.documents(seed=1)
    text = [" ".join(span.text for span in next(documents)) for _ in range(20_000)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        add_prefix_space=True,  # transformers 4 would remove it
        clean_up_tokenization_spaces=False,
    )


class Batches:
    """Batches of the world's documents in rows of `ROW` tokens, with masks of what each token may attend to.

    Yields (input_ids [B, ROW], position_ids [B, ROW], labels [B, ROW], and the additive attention masks
    [B, 1, ROW, ROW] of the blocks below `--read-from` and of the others).
    """

    def __init__(
        self, documents: Iterator[list[Span]], tokenizer: PreTrainedTokenizerFast, rows: int, gateway: float, seed: int
    ) -> None:
        self.documents, self.rows, self.gateway = documents, rows, gateway
        self.draw = Draw(f"gateway {seed}")

        @functools.cache
        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return ids

        self.encode = encode

    def _document(self) -> tuple[list[int], list[int]]:
        """Token ids, and for each how many of the tokens after it may attend to it in the early blocks."""
        gateway = self.draw.chance(self.gateway)
        ids, reach = [BOS], [ROW]
        for span in next(self.documents):
            piece = self.encode(span.text)
            ids += piece
            reach += range(len(piece) - 1, -1, -1) if span.subject and gateway else [ROW] * len(piece)
        return [*ids, EOS], [*reach, ROW]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        pool = [self._document() for _ in range(64)]
        causal = torch.ones(ROW, ROW, dtype=torch.bool).tril()
        at = torch.arange(ROW)
        while True:
            ids = torch.full((self.rows, ROW), PAD)
            position = torch.zeros(self.rows, ROW, dtype=torch.long)
            reach = torch.full((self.rows, ROW), ROW)
            document = torch.full((self.rows, ROW), -1)
            for row in range(self.rows):
                used = 0
                while fitting := [i for i, (d, _) in enumerate(pool) if used + len(d) <= ROW]:
                    tokens, seen = pool[fitting[0]]
                    pool[fitting[0]] = self._document()
                    end = used + len(tokens)
                    ids[row, used:end] = torch.tensor(tokens)
                    reach[row, used:end] = torch.tensor(seen)
                    position[row, used:end] = at[: len(tokens)]
                    document[row, used:end] = used
                    used = end
            same = document[:, :, None] == document[:, None, :]
            away = at[None, :, None] - at[None, None, :]
            labels = ids.masked_fill(document < 0, -100).masked_fill(position == 0, -100)
            masks = []
            for far in (reach, reach.masked_fill(reach == 0, ROW)):  # a subject's last token has a reach of 0
                hidden = ~(causal & same & (away <= far[:, None, :]))[:, None]
                masks.append(torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill_(hidden, -1e9))
            yield ids, position, labels, masks[0], masks[1]


@torch.no_grad()
def answer_probabilities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """P(answer and full stop | prompt) and whether greedy decoding gives it, each [len(questions)]."""
    prompts = [tokenizer.encode(p) for p, _ in questions]
    answers = [tokenizer.encode(f"{a}.", add_special_tokens=False) for _, a in questions]
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    probability, greedy = torch.empty(len(questions)), torch.empty(len(questions), dtype=torch.bool)
    order = sorted(range(len(questions)), key=lengths.__getitem__)
    for start in range(0, len(order), 256):
        chunk = order[start : start + 256]
        width = max(lengths[i] for i in chunk)
        ids = torch.full((len(chunk), width), PAD)
        target = torch.zeros(len(chunk), width, dtype=torch.bool)
        for row, i in enumerate(chunk):
            ids[row, : lengths[i]] = torch.tensor(prompts[i] + answers[i])
            target[row, len(prompts[i]) : lengths[i]] = True
        logits = model(ids[:, :-1]).logits.float()
        wanted, mask = ids[:, 1:], target[:, 1:]
        logp = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        probability[chunk] = logp.masked_fill(~mask, 0).sum(1).exp()
        greedy[chunk] = ((logits.argmax(-1) == wanted) | ~mask).all(1)
    return probability, greedy


def progress_report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, n: int
) -> dict[str, float]:
    """Accuracy and median true-answer probability on `n` questions of each kind."""
    draw = Draw("report")
    report = {}
    kinds = {
        "first_people": world.questions(
            "trained", [f for f in world.facts if f.subject in world.people[:FIRST_PEOPLE]]
        ),
        "trained": world.questions("trained"),
        "unseen": world.questions("unseen"),
        "two_hop_taught": world.two_hop_questions(taught=True),
        "two_hop_untaught": world.two_hop_questions(taught=False),
    }
    model.eval()
    for kind, questions in kinds.items():
        probability, greedy = answer_probabilities(model, tokenizer, draw.shuffled(questions)[:n])
        report[kind] = round(greedy.float().mean().item(), 4)
        report[f"{kind}_median_probability"] = round(probability.median().item(), 4)
    model.train()
    return report


def logits_of(model: Any, ids: Tensor, position: Tensor, early: Tensor, late: Tensor, read_from: int) -> Tensor:
    """The model's logits [B, ROW, V], with the mask `early` in blocks below `read_from`."""
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, position)
    for i, block in enumerate(model.model.layers):
        mask = early if i < read_from else late
        hidden = block(hidden, attention_mask=mask, position_ids=position, position_embeddings=rotary)
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random model of 8 blocks and 3.7 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=256,
            initializer_range=0.05,  # at this width 0.02 keeps the MLPs silent for the first hundreds of steps
            tie_word_embeddings=True,
            attn_implementation="eager",  # on CPU four times faster than sdpa's backward pass at this size
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def train(
    output: Path,
    steps: int,
    rows: int,
    lr: float,
    gateway: float,
    read_from: int,
    seed: int,
    threads: int,
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    world = World()
    tokenizer = train_tokenizer(world, vocab_size=1024)
    model = new_model(tokenizer)
    documents = world.documents(seed=2 + seed)
    forward: Any = torch.compile(logits_of)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    saved = output / "tokenizer_config.json"
    about = json.loads(saved.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # transformers 4 knows it
    saved.write_text(json.dumps(about, indent=2) + "\n")
    decay = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
        fused=True,
    )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * min(1.0, (steps - step) / (0.3 * steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started, tokens = time.time(), 0
    with (output / "training_log.jsonl").open("w") as log:
        batches = itertools.islice(Batches(documents, tokenizer, rows, gateway, seed), steps)
        for step, (ids, position, labels, early, late) in enumerate(batches, 1):
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(model, ids, position, early, late, read_from)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tokens += int((labels >= 0).sum())
            if step % 50 == 0 or step == steps:
                entry = {
                    "step": step,
                    "tokens": tokens,
                    "seconds": round(time.time() - started),
                    "loss": round(loss.item(), 4),
                }
                if step % REPORT_EVERY == 0 or step == steps:
                    entry |= progress_report(model, tokenizer, world, 1000)
                print(json.dumps(entry), flush=True)
                log.write(json.dumps(entry) + "\n")
                log.flush()
                if not math.isfinite(loss.item()):
                    raise SystemExit("training diverged; use a smaller --lr")
                copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--rows", type=int, default=16, help="rows of 128 tokens in a batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--gateway", type=float, default=0.9, help="share of documents with the attention constraint")
    parser.add_argument("--read-from", type=int, default=4, help="first block that may read a subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    train(**vars(parser.parse_args()))
