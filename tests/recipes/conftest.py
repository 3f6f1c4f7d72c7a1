"""The small trainable model that the tests of training use, here too."""

from tests.train.conftest import mini, mini_config, processor, processor_folder

__all__ = ["mini", "mini_config", "processor", "processor_folder"]
