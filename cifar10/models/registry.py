"""The registry of CIFAR networks, and the input they were trained with."""

from distill.models.classifier import InputSpec
from distill.models.registry import Registry

MODELS = Registry("CIFAR-10")

# The deviations are those of kuangliu/pytorch-cifar, whose checkpoints people have; the data's are 0.247, 0.243, 0.262.
CIFAR_INPUT = InputSpec(size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
