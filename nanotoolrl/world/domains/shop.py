"""A shop with one cart."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, ToolError, new_id, record
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import NOUNS, ids


@dataclass
class Shop(API):
    """A shop with one cart."""

    pool = "train"
    items: list[dict] = field(default_factory=list)
    cart: list[dict] = field(default_factory=list)
    orders: list[dict] = field(default_factory=list)

    def find_item(self, name: str) -> dict:
        """Find number and price of an item."""
        item = record(self.items, "item", name, by="name")
        return {"item_id": item["id"], "price": item["price"]}

    def add_to_cart(self, item_id: int, quantity: int = 1) -> str:
        """Put an item into the cart."""
        record(self.items, "item", item_id)
        if quantity < 1:
            raise ToolError(f"the quantity must be at least 1, not {quantity}")
        self.cart.append({"item_id": item_id, "quantity": quantity})
        return "in cart"

    def checkout(self, address: str) -> dict:
        """Order what is in the cart to an address."""
        if not self.cart:
            raise ToolError("the cart is empty; fill it with add_to_cart")
        number = new_id(self.orders)
        self.orders.append({"id": number, "address": address, "items": self.cart, "status": "packed"})
        self.cart = []
        return {"order_id": number}

    def order_status(self, order_id: int) -> dict:
        """Read the status of an order."""
        return {"status": record(self.orders, "order", order_id)["status"]}

    def cancel_order(self, order_id: int) -> str:
        """Cancel an order."""
        order = record(self.orders, "order", order_id)
        if order["status"] == "cancelled":
            raise ToolError(f"order {order_id} is cancelled already")
        order["status"] = "cancelled"
        return "cancelled"


def world(rng: Random, size: int) -> dict:
    rows = zip(ids(rng, size), rng.sample(NOUNS, min(size, 30)), strict=False)
    items = [{"id": i, "name": name, "price": rng.randint(2, 99)} for i, name in rows]
    orders = [
        {
            "id": i,
            "address": f"{rng.choice(NOUNS)} street {rng.randint(1, 99)}",
            "items": [],
            "status": status,
        }
        for i, status in zip(ids(rng, 3), rng.sample(["packed", "sent", "late", "paid"], 3), strict=True)
    ]
    return {"items": items, "cart": [], "orders": orders}


def draw(rng: Random, api: Shop) -> dict:
    order = rng.choice([order["id"] for order in api.orders if order["status"] != "cancelled"])
    address = f"{rng.choice(NOUNS)} street {rng.randint(1, 99)}"
    return {
        "item": rng.choice(api.items)["name"],
        "quantity": rng.randint(2, 9),
        "address": address,
        "order": order,
    }


GOALS = [
    Goal("What does the {item} cost?|Look up the price of the {item}.", "find_item name=item", "{price}."),
    Goal(
        "Put {quantity} of the {item} into the cart.|Add the {item} to my cart, {quantity} of it.",
        "find_item name=item; add_to_cart item_id quantity",
        "In the cart.",
        vague="Put some of the {item} into the cart.|Add the {item} to my cart, more than one.",
        question="How many?",
        answer="{quantity}.|Take {quantity}.",
    ),
    Goal(
        "Order {quantity} of the {item} to {address}.|"
        "Buy the {item}, {quantity} of it, and send it to {address}.",
        "find_item name=item; add_to_cart item_id quantity; checkout address",
        "Ordered as {order_id}.",
        vague="Order {quantity} of the {item}.|Buy the {item}, {quantity} of it.",
        question="To which address?",
        answer="To {address}.|Send it to {address}.",
    ),
    Goal(
        "Where is order {order}?|Is order {order} on its way?",
        "order_status order_id=order",
        "It is {status}.",
    ),
    Goal(
        "Cancel order {order}.|I do not want order {order} any more.",
        "cancel_order order_id=order",
        "Cancelled.",
    ),
]

register(Shop, world, draw, GOALS)
