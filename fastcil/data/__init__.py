"""Images and labels: stores, readers, augmentation, the embedded default data."""

from fastcil.data.augment import Augmentation as Augmentation
from fastcil.data.load import load as load
from fastcil.data.load_examples import load_examples as load_examples
from fastcil.data.places import resolve as resolve
from fastcil.data.read import read_batch as read_batch
from fastcil.data.read import read_images as read_images
from fastcil.data.read import view_geometry as view_geometry
from fastcil.data.store import Dataset as Dataset
from fastcil.data.store import Examples as Examples
from fastcil.data.store import ImageStore as ImageStore
from fastcil.data.unlabelled import load_images as load_images
