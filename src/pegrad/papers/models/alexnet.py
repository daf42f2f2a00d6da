"""AlexNet in its one-stream form."""

from functools import partial

import torch
import torch.nn.functional as F

from pegrad.papers.models.base import Model, on_images, sequential
from pegrad.papers.models.layers import conv, linear, max_pool, output_size


def alexnet(
    *, image_size: int = 224, in_channels: int = 3, num_classes: int = 1000, hidden_features: int = 4096
) -> Model:
    """AlexNet with the layers of torchvision's, less the dropout.

    Args:
        image_size: height and width of an image, at least 63.
        in_channels: channels of an image.
        num_classes: how many classes.
        hidden_features: outputs of each of the two hidden linear layers.

    Returns:
        The model: one image (C, H, W) to logits (num_classes,); 61,100,840 parameters by default.

    Raises:
        ArgumentError: a size is below 1, or the image is too small.

    Source:
        Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks".
    """
    output_size(image_size, (11, 4, 2), (3, 2, 0), (3, 2, 0), (3, 2, 0))
    features = sequential(
        conv1=conv(in_channels, 64, 11, stride=4, padding=2),
        relu1=F.relu,
        pool1=max_pool(3, stride=2),
        conv2=conv(64, 192, 5, padding=2),
        relu2=F.relu,
        pool2=max_pool(3, stride=2),
        conv3=conv(192, 384, 3, padding=1),
        relu3=F.relu,
        conv4=conv(384, 256, 3, padding=1),
        relu4=F.relu,
        conv5=conv(256, 256, 3, padding=1),
        relu5=F.relu,
        pool5=max_pool(3, stride=2),
        resize=partial(F.adaptive_avg_pool2d, output_size=(6, 6)),
        flatten=torch.flatten,
    )
    classifier = sequential(
        linear1=linear(256 * 6 * 6, hidden_features),
        relu1=F.relu,
        linear2=linear(hidden_features, hidden_features),
        relu2=F.relu,
        linear3=linear(hidden_features, num_classes),
    )
    return on_images(sequential(features=features, classifier=classifier), in_channels, image_size)
