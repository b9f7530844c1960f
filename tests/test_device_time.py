"""The benchmarks' account of an epoch's time: kernels known by their names, gaps, and what has to be computed."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import device_time

KERNEL_NAMES = {
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>(Flash_fwd_params)",
        "fmha_cutlassB_bf16_aligned_128x64_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "Adam": (
        "localized_adam_kernel",
        "aten::_fused_adam_",
        "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float>>",
    ),
    "head and loss": (
        "_exponentials",
        "_settle",
        "_accumulate",
        "_finish",
        "aten::softmax",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float, float>",
    ),
    "matrix products": (
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "aten::mm",
        "aten::addmm",
    ),
    "other elementwise": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel(at::TensorIteratorBase&)>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>",
        "Memcpy HtoD (Pinned -> Device)",
        "aten::mul",
        "aten::silu_backward",
        "aten::index_put_",
    ),
    device_time.GAPS: ("autograd::engine::evaluate_function: MmBackward0", "MmBackward0", "Optimizer.step#Adam.step"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, some in KERNEL_NAMES.items() for name in some])
def test_kernels_are_known_by_their_names(kind: str, name: str) -> None:
    assert device_time.class_of(name) == kind


def test_what_no_kernel_accounts_for_is_a_host_gap() -> None:
    times = {"aten::mm": 2.0, "nvjet_tst": 1.0, "localized_adam_kernel": 1.0, "MmBackward0": 3.0}
    found = device_time.shares(times, 10.0)
    assert {name: share for name, share in found.items() if share} == pytest.approx(
        {"matrix products": 0.3, "Adam": 0.1, device_time.GAPS: 0.6}
    )
    assert tuple(found) == device_time.NAMES
    overlapping = device_time.shares(times, 2.0)
    assert (overlapping["matrix products"], overlapping[device_time.GAPS]) == (0.75, 0.0)


def test_the_products_of_a_training_are_counted() -> None:
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=2,
        intermediate_size=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=4,
    )
    # a token in a block: q and o 16, k and v 16, gate and up 24, down 12; in attention 8 for each token that is read
    prefix = 3 * 68 + 6 * 8  # block 0
    frozen = 3 * 56 + 6 * 8  # block 1 without its down_proj
    trained = 2 * 3 * 12
    above = 2 * 3 * 68 + 3 * 6 * 8  # block 2, forward and backward
    last = 2 * (2 * 52 + 3 * 16) + 3 * 5 * 8  # two target tokens, which read two and three
    head = 2 * 2 * 20
    # three tokens go in, and the second and third predict
    count = device_time.training_flops(config, torch.tensor([3]), torch.tensor([2]), layer=1, epochs=2)
    assert count == prefix + frozen + 2 * (trained + above + last + head)
    twice = device_time.training_flops(config, torch.tensor([3, 3]), torch.tensor([2, 2]), layer=1, epochs=2)
    assert twice == 2 * count
