"""CIFAR networks by name, for 32x32 images; state_dict keys and function agree with the reference definitions.

To add one: write `@MODELS.register def my_network(num_classes: int) -> nn.Module` in a file of this folder and
import the file below. The contract tests pick it up by themselves.
"""

from cifar10.models import densenet, efficientnet, mobilenetv2, resnet, resnext
from cifar10.models.registry import CIFAR_INPUT, MODELS

__all__ = ["CIFAR_INPUT", "MODELS", "densenet", "efficientnet", "mobilenetv2", "resnet", "resnext"]
