"""Train one matrix as LLaMA-Factory does with `finetuning_type: freeze`, in a plain loop without its gradient.

    python examples/localized_like_llama_factory.py --model ./Llama-3-8B --layer 22 --bf16

The names on the left are LLaMA-Factory's. Its loss is the mean over the target tokens of all micro-batches of a step.
With `bf16: true` it keeps the trained weight in fp32 beside frozen ones in bf16; here the weight has an fp32 master.
"""

import argparse

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from fastedit import ops
from fastedit.demo import World, checkpoint_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=checkpoint_path(), help="folder or hub name; a Llama, Mistral or Qwen")
parser.add_argument("--layer", type=int, default=5)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--bf16", action="store_true")
args = parser.parse_args()

freeze_trainable_modules = "mlp.down_proj"
per_device_train_batch_size, gradient_accumulation_steps = 5, 2
learning_rate, num_train_epochs, lr_scheduler_type, warmup_ratio = 1e-2, args.epochs, "cosine", 0.1
max_grad_norm, weight_decay = 1.0, 0.0

tokenizer = AutoTokenizer.from_pretrained(args.model)
dtype = torch.bfloat16 if args.bf16 else torch.float32
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).requires_grad_(False)
rows, labels = [], []  # train_on_prompt: false; a label is the next token, and -100 is none
for request in World().requests(10):
    prompt = tokenizer(request.prompt).input_ids
    target = tokenizer(f" {request.target}", add_special_tokens=False).input_ids
    rows.append(torch.tensor(prompt + target))
    labels.append(torch.tensor([-100] * (len(prompt) - 1) + target + [-100]))
ids = pad_sequence(rows, batch_first=True)
labels = pad_sequence(labels, batch_first=True, padding_value=-100)

module = model.get_submodule(f"model.layers.{args.layer}.{freeze_trainable_modules}")
optimizer = ops.localized(
    module, lr=learning_rate, weight_decay=weight_decay, decoupled=True, max_norm=max_grad_norm, accumulate=True
)
step_size = per_device_train_batch_size * gradient_accumulation_steps
steps = num_train_epochs * -(-len(ids) // step_size)
schedule = get_scheduler(lr_scheduler_type, optimizer, int(warmup_ratio * steps), steps)
head = model.get_output_embeddings().weight
generator = torch.Generator().manual_seed(42)
for epoch in range(1, num_train_epochs + 1):
    total = 0.0
    for batch in torch.randperm(len(ids), generator=generator).split(step_size):
        n_tokens = int((labels[batch] >= 0).sum())
        for some in batch.split(per_device_train_batch_size):
            wanted = labels[some] >= 0
            hidden = model.base_model(ids[some], use_cache=False).last_hidden_state[wanted]  # [R, h]
            share = torch.full((len(hidden),), 1 / n_tokens)
            loss, _ = ops.target_cross_entropy(hidden, head, labels[some][wanted], share)
            loss.backward()
            total += loss.item() * step_size / len(ids)
        optimizer.step()
        schedule.step()
    print(f"epoch {epoch}: loss {total:.4f}")
