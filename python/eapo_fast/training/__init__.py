"""One optimizer step: pack rollouts, run the trunk once per micro-batch, fused loss, update."""
