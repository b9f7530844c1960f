"""Train one matrix of a model with two of fastedit's operations, in a plain torch loop.

    python examples/kernels_in_your_training_loop.py --model ./Llama-3-8B --module model.layers.22.mlp.down_proj

`target_cross_entropy` is the loss at the target tokens and keeps no logits. `localized` makes Adam's step in the
backward pass and keeps no gradient of the weight. Without --model the small model of the package is trained.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit import ops
from fastedit.demo import World, checkpoint_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=checkpoint_path(), help="folder or hub name; a Llama, Mistral or Qwen")
parser.add_argument("--module", default="model.layers.5.mlp.down_proj", help="path of a linear layer")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
rows, labels = [], []  # a label is the next token, where that is a target; elsewhere it is -1
for request in World().requests(10):
    prompt = tokenizer(request.prompt).input_ids
    target = tokenizer(f" {request.target}", add_special_tokens=False).input_ids
    rows.append(torch.tensor(prompt + target))
    labels.append(torch.tensor([-1] * (len(prompt) - 1) + target + [-1]))
ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-1)
wanted = labels >= 0
share = torch.full((int(wanted.sum()),), 1 / int(wanted.sum()))  # weight of each target token in the loss

head = model.get_output_embeddings().weight
ops.localized(model.get_submodule(args.module), lr=args.lr)
for step in range(1, args.steps + 1):
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[wanted]  # [R, h]
    loss, _ = ops.target_cross_entropy(hidden, head, labels[wanted], share)
    loss.backward()  # the step too
    print(f"step {step}: loss {loss.item():.4f}")
