"""One folder an op: its public function, its reference in plain torch, its fast implementations.

`eapo_fast.ops` exports the ops of training; `sample` and `paged_attention` serve the sampler. The
CPU twins are in the native module `eapo_fast._core`. Nothing is imported here.
"""
