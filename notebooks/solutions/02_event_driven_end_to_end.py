# %% say
def say(room, message):
    chat.send(message, key=room)

task = "`say(room, message)` reaches those who listen to the room, in order."
exercise(task, check=try_out, say=say)
