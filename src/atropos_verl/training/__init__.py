"""From batches to optimiser steps: samples, advantages, losses, weight sync."""
