"""minissl: self-supervised vision, step by step, and its reference implementation in the same code.

To read it in order:

    method      what a method promises, and Tokens, the one type that passes between all parts
    vit         image -> Tokens, by `transformer`, `patches` and `positions`; `convnet` does it by convolutions
    text        sentence -> numbers -> vector
    augment     operations on a batch of images, each image with its own draw, on the device
    views       the papers' recipes: a batch of images -> other looks at them
    color       lightness and colour apart
    teacher     a moving average of a network, and schedules of progress
    balance     prototypes that are all used, vectors that are apart; `masking`, which patches are hidden; `heads`
    methods/    one file per paper: its losses as functions, and a class that feeds them
    train       the loop, with `order`, `optim`, `parallel` and `distribute`
    evaluate/   how good the features are
    visualize/  what they look like

Around these: `data` (the world Scenes, real data sets, folders), `encoders` (each by its name), `checkpoint` and
`record` (nothing is lost), `machine` (device, precision, what a run will take), `config` (what was asked for), `runs`
(a run and its folder), `scores` and `reports` (the numbers of a run, of several), `footage` (objects followed through
clips), `doctor` (why a run does not learn), `lab` (collapse, provoked), `pretrained` (a network from a file), `film`
(attention while it is learnt), `exercises` (their checks).

The command is `python -m minissl`.
"""
