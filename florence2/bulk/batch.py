"""`find_images` under its former name, until `florence2.inspect.probe` calls it by the new one."""

from florence2.bulk.sources import find_images as find_pictures

__all__ = ["find_pictures"]
