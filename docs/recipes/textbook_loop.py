"""Fine-tune VGG16 with the textbook loop: every photo runs through the complete network in every epoch.

    python docs/recipes/textbook_loop.py path/to/photos     (train/CLASS/*.jpg and valid/CLASS/*.jpg)

`finetune train --backbone vgg16` trains the same last layer on cached features.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms as t
from torchvision.datasets import ImageFolder
from torchvision.models import VGG16_Weights, vgg16

SEED, EPOCHS, BATCH_SIZE, LEARNING_RATE, MOMENTUM = 0, 10, 64, 0.001, 0.9
NORMALIZE = t.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # of ImageNet's photos, as in pretraining


def open_photos(folder: Path, resize_px: int = 256, crop_px: int = 224) -> ImageFolder:
    """Open the photos of one split. The folder's name is the class."""
    return ImageFolder(folder, t.Compose([t.Resize(resize_px), t.CenterCrop(crop_px), t.ToTensor(), NORMALIZE]))


def replace_head(model: nn.Module, num_classes: int) -> None:
    """Freeze the pretrained layers and replace the last one by a new layer for our classes."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    torch.manual_seed(SEED)
    new_layer = nn.Linear(model.classifier[6].in_features, num_classes)
    model.classifier[6] = nn.Sequential(new_layer, nn.LogSoftmax(dim=1))


def fit(model: nn.Module, train: ImageFolder, valid: ImageFolder, epochs: int, batch_size: int) -> list[tuple[float, ...]]:
    """Train the new layer. Returns the training loss, the validation loss and the validation accuracy of each epoch."""
    order = torch.Generator()
    train_batches = DataLoader(train, batch_size, sampler=RandomSampler(train, generator=order))
    valid_batches = DataLoader(valid, batch_size)
    loss_of = nn.NLLLoss()
    optimizer = torch.optim.SGD(model.classifier[6].parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    history = []
    for epoch in range(epochs):
        order.manual_seed(SEED * 1_000_003 + epoch)  # the order of `finetune train`, to compare the results
        train_loss, valid_loss, correct = 0.0, 0.0, 0
        model.train()
        for images, labels in train_batches:
            optimizer.zero_grad()
            loss = loss_of(model(images), labels)
            loss.backward()
            optimizer.step()
            train_loss += loss.item() * len(labels) / len(train)
        model.eval()
        with torch.no_grad():
            for images, labels in valid_batches:
                log_probs = model(images)
                valid_loss += loss_of(log_probs, labels).item() * len(labels) / len(valid)
                correct += (log_probs.argmax(dim=1) == labels).sum().item()
        history.append((train_loss, valid_loss, correct / len(valid)))
        print("epoch {}: train loss {:.4f}, valid loss {:.4f}, valid accuracy {:.2%}".format(epoch + 1, *history[-1]))
    return history


if __name__ == "__main__":
    photos = [open_photos(Path(sys.argv[1]) / split) for split in ("train", "valid")]
    network = vgg16(weights=VGG16_Weights.DEFAULT)
    replace_head(network, len(photos[0].classes))
    fit(network, *photos, EPOCHS, BATCH_SIZE)
