"""Reinforcement learning: GRPO with the stabilisers of DeepSeek-V3.2.

Source: arXiv:2512.02556, section 3. Nothing is imported here, so that problems
and rewards can be used without the trainer.
"""
