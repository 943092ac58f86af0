"""Run by `accelerate launch` in tests/test_ppo.py: the short toy run; the main process writes its history."""

import sys

from tests import test_ppo

if __name__ == "__main__":
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes != 2:
        sys.exit(f"expected 2 processes, found {accelerator.num_processes}")
    history = test_ppo.train(test_ppo.SHORT, held_out=test_ppo.PROMPTS[:3], accelerator=accelerator)
    if accelerator.is_main_process:
        history.to_csv(sys.argv[1], index=False)
    accelerator.end_training()
