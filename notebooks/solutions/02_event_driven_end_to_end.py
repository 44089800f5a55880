# %% say
def say(room, message):
    chat.send(message, key=room)

exercise("`say(room, message)` reaches those who listen to the room, in order.", check=try_out, say=say)
