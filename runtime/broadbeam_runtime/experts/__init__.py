"""Mixture of experts: routing, the exchange between ranks, the experts themselves."""
