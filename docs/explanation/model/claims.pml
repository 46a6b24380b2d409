/* Claims, proofs and migration (docs/explanation/one-writer.md) as a small model, for the model checker spin.
 *
 * `make model` searches every state that it can reach. docs/explanation/model.md says what it shows, and what it does not.
 *
 * One instance, two nodes, MASTERS masters one after the other, JOBS jobs one after the other. Everything happens in one process that does
 * one thing at a time, any thing that can happen: so a machine or a daemon that pauses is one to which nothing happens for a while.
 *
 * The network: an order that was sent stays in `sent` for ever, and may reach its agent at any time, as often as it likes, or never. So
 * orders are lost, late, doubled and in any order; and what a deposed master still sends is an order of its term that comes late.
 *
 * -DBUG=NAME takes one protection out of the protocol; each must give a counter-example:
 *   UNDO        jobs/undo.py: the undo of a start gives the claim back without the agent's word
 *   GENERATION  agent/guests.py: _check_generation is missing
 *   FSYNC       agent/memory.py: a power cut takes what the agent remembered
 *   GRACE       master/health.py: a new master takes a person's word before it has listened for the whole grace
 *   TURN        agent/memory.py: see_turn is missing: orders of earlier jobs are obeyed
 *   OWNER       agent/memory.py: another node's memory is taken for one's own
 *   LOCK        instance_power.py: a job does not lock the node that it starts on, so that the node is readmitted meanwhile
 */

#define UNDO 1
#define GENERATION 2
#define FSYNC 3
#define GRACE 4
#define TURN 5
#define OWNER 6
#define LOCK 7
#ifndef BUG
#define BUG 0
#endif
#ifndef JOBS
#define JOBS 1
#endif
#ifndef MASTERS
#define MASTERS 1
#endif
/* 1: jobs may be this, too. */
#ifndef MIGRATE
#define MIGRATE 1
#endif
#ifndef STOP
#define STOP 1
#endif

#define OTHER(n) (3 - (n))

/* --- what is durable in the store (store/cache.py: only the master of the newest term can write it) --- */

byte holder = 0;                /* Claim.holder; 0: nobody */
byte generation = 0;            /* Claim.generation */
byte target = 0;                /* Claim.migration.target; 0: no migration */
bool proof[3];                  /* DeathProof of a node */
byte readmit[3];                /* node.readmit, a job of its own that has the node, not the instance: 0 none, 1 ordered, 2 acknowledged */
byte refuse[3];                 /* the generation that it lets the node refuse */

byte job = 0;                   /* the present job; jobs are counted from 0, in the order in which they get the instance's lock */
byte pc = 0;                    /* how far its journal is */
bool moving = false;            /* it is a migration: it has locked H, too */
byte back = 0;                  /* the journaled undo "claim.return" of take_from_dead: to which node */
/* What the journals of all jobs hold, and so what their orders carry. */
byte H[JOBS];                   /* the holder that is asked; a migration's source */
byte R[JOBS];                   /* the generation that is stopped or released there */
byte T[JOBS];                   /* where it starts; a migration's target */
byte G[JOBS];                   /* the generation that was taken for that */
byte C[JOBS];                   /* where a cold start is */

/* --- the master's process (rpc/agents.py, master/health.py, jobs/engine.py) --- */

byte term = 1;
bool ready = true;              /* jobs/engine.py _recover: the agents of the journal have acknowledged the term */
bool fresh[3];                  /* doubt(node) > 0: the grace since its last report, or since this master began, is not over */
byte seen = 0;                  /* instance_migrate.py _look: the source's state, as it was told */

/* --- the network --- */

short sent[MASTERS * JOBS];          /* of job j in term t, at (t - 1) * JOBS + j: the orders that were sent, as bits */
short reply[JOBS];              /* the orders that some agent has answered with success */

/* --- the nodes --- */

byte heard[3];                  /* Memory.term */
byte turn[3];                   /* Memory.see_turn: the latest job that has spoken, + 1 */
byte refused[3];                /* Memory.refused */
short memory[JOBS];             /* Memory.step: orders that are done (or undone) where they go */
bool trust[3];                  /* Contact.check passes: a report was answered within TRUST, not with "dead" */
byte begun[3];                  /* agent/guests.py start: past the check of the generation, attaching disks; job + 1, cold: job + 101 */
byte guest[3];                  /* hypervisor: the guest's process */
byte has[3];                    /* the generation with which it was started */

#define NONE 0
#define RUN 1                   /* writes its disks */
#define WAITING 2               /* a target without the guest's memory */
#define ARRIVING 3              /* a target that has been sent everything, and loads it */
#define LOADED 4                /* a target that could run */
#define STILL 5                 /* a source before the switchover: paused, and runs again if anything goes wrong */
#define MIGRATED 6              /* a source that has completed: it never runs again */

/* --- orders: bits; to whom; with which generation --- */

#define RELEASE 1               /* running.py release_from: to H, generation R */
#define START 2                 /* running.py start_on: to T, G */
#define UNSTART 4               /* its undo, guest.stop: to T, G */
#define END 8                   /* running.py stop_on: to H, R */
#define INCOMING 16             /* instance_migrate.py migrate: to T, G */
#define UNINCOMING 32           /* its undo, guest.stop: to T, G */
#define OUT 64                  /* guest.migrate_out: to H */
#define UNOUT 128               /* its undo, guest.migrate_cancel: to H */
#define GO_ON 256               /* guest.migrate_continue: to H */
#define RESUME 512              /* guest.resume: to T, G */
#define KILL_TARGET 1024        /* settle, verdict source: guest.stop: to T, G */
#define CLEAR_SOURCE 2048       /* settle, verdict target: guest.stop: to H, G - 1 */
#define RELEASE_SOURCE 4096     /* _cold_start: guest.stop: to H, G */
#define RELEASE_TARGET 8192     /* _cold_start: guest.stop: to T, G */
#define COLD 16384              /* _cold_start: guest.start: to C, G + 1 */

/* --- where a job is: it waits for the answer to ... --- */

#define IDLE 0
#define W_RELEASE 1
#define TAKE 2
#define W_START 3
#define W_UNSTART 4
#define W_END 5
#define W_INCOMING 6
#define W_OUT 7
#define W_UNOUT 8
#define W_UNINCOMING 9
#define W_GO_ON 10
#define LOOK 11
#define LOOK_AGAIN 12
#define W_RESUME 13
#define W_KILL_TARGET 14
#define W_CLEAR_SOURCE 15
#define W_RELEASE_SOURCE 16
#define W_RELEASE_TARGET 17
#define W_COLD 18

/* The order that it repeats, and that a new master sends again. */
#define AWAITED (pc == W_RELEASE -> RELEASE : (pc == W_START -> START : (pc == W_UNSTART -> UNSTART : (pc == W_END -> END : \
    (pc == W_INCOMING -> INCOMING : (pc == W_OUT -> OUT : (pc == W_UNOUT -> UNOUT : (pc == W_UNINCOMING -> UNINCOMING : \
    (pc == W_GO_ON -> GO_ON : (pc == W_RESUME -> RESUME : (pc == W_KILL_TARGET -> KILL_TARGET : \
    (pc == W_CLEAR_SOURCE -> CLEAR_SOURCE : (pc == W_RELEASE_SOURCE -> RELEASE_SOURCE : \
    (pc == W_RELEASE_TARGET -> RELEASE_TARGET : (pc == W_COLD -> COLD : 0)))))))))))))))

/* === what must hold === */

/* Who starts a guest on a node shares the node's lock, and node.readmit wants it alone. */
#if BUG == LOCK
#define LOCKED(n) false
#else
#define LOCKED(n) (pc != IDLE && (T[job] == n || (moving && H[job] == n)))
#endif

#define NODES_OF_CLAIM(n) (holder == n || target == n)

inline check() {
    assert(!(guest[1] == RUN && guest[2] == RUN));              /* one writer */
    assert(guest[1] != RUN || NODES_OF_CLAIM(1));               /* and the claim names it */
    assert(guest[2] != RUN || NODES_OF_CLAIM(2))
}

/* === the master === */

inline send(order, next) {
    sent[(term - 1) * JOBS + job] = sent[(term - 1) * JOBS + job] | (order);
    pc = next
}

#define ANSWERED(order) (reply[job] & (order))

inline end_job() {
    pc = IDLE; back = 0; seen = 0; moving = false;
    job++
}

/* running.py free_claim */
inline free(n, g) {
    if
    :: holder == n && generation == g -> holder = 0; target = 0
    :: else
    fi
}

/* The claim is free, or T's own: take the claim, order the start. */
inline take() {
    generation++;
    holder = T[job];
    G[job] = generation;
    send(START, W_START)
}

/* A start of the guest on a node: instance.start, instance.failover and the reconcile loop's restart-missing. */
inline begin_start(n) {
    T[job] = n;
    if
    :: holder == 0 -> pc = TAKE
    :: holder != 0 && !proof[holder] ->                         /* (a) the agent's word */
        H[job] = holder; R[job] = generation;
        send(RELEASE, W_RELEASE)
    :: holder != 0 && holder != n && !fresh[holder] && (proof[holder] || guest[holder] == NONE) ->
        proof[holder] = true;                                   /* (c) a person's word: instance_power.py take_from_dead */
        back = holder;
        holder = 0;
        pc = TAKE
    :: else -> T[job] = 0                                       /* refused */
    fi
}

inline begin_stop() {
    H[job] = holder; R[job] = generation;
    send(END, W_END)
}

inline begin_migration() {
    moving = true;
    H[job] = holder; T[job] = OTHER(holder);
    target = OTHER(holder);
    generation++;
    G[job] = generation;
    send(INCOMING, W_INCOMING)
}

/* The undo of a start ended: claim.free, then claim.return. */
inline start_undone() {
    free(T[job], G[job]);
    if
    :: back != 0 && holder == 0 && proof[back] -> holder = back
    :: else
    fi;
    end_job()
}

inline start_failed() {
#if BUG == UNDO
    start_undone()
#else
    send(UNSTART, W_UNSTART)
#endif
}

/* instance_migrate.py settle */
inline verdict_target() { holder = T[job]; target = 0; seen = 0; send(RESUME, W_RESUME) }
inline verdict_source() { target = 0; seen = 0; send(KILL_TARGET, W_KILL_TARGET) }
inline verdict_nobody() { seen = 0; send(RELEASE_SOURCE, W_RELEASE_SOURCE) }

inline cold_start(n) {
    generation = G[job] + 1;
    target = 0;
    holder = n;
    C[job] = n;
    send(COLD, W_COLD)
}

/* === an agent carries out an order === */

/* Service.handle: the term, the turn, and what it did before. An order that is refused here has no effect, so it is no event. */
#if BUG == TURN
#define TURN_FITS(n, j) true
#else
#define TURN_FITS(n, j) ((j) + 1 >= turn[n])
#endif
#define COMES(n, j, t, order) ((sent[((t) - 1) * JOBS + (j)] & (order)) && (t) >= heard[n] && TURN_FITS(n, j) && !(memory[j] & (order)))

/* Orders of the term before have no effect any more on a node that has heard of this one: they need not be remembered either. */
#define TO_TARGET (START | UNSTART | INCOMING | UNINCOMING | RESUME | KILL_TARGET | RELEASE_TARGET)
#define TO_HOLDER (RELEASE | END | OUT | UNOUT | GO_ON | CLEAR_SOURCE | RELEASE_SOURCE)
#if MASTERS > 1 && BUG != FSYNC && BUG != OWNER
#define OVER(n, j) \
    if :: heard[n] == 2 && T[j] == n -> sent[j] = sent[j] & ~TO_TARGET :: else fi; \
    if :: heard[n] == 2 && H[j] == n -> sent[j] = sent[j] & ~TO_HOLDER :: else fi; \
    if :: heard[n] == 2 && C[j] == n -> sent[j] = sent[j] & ~COLD :: else fi;
#if JOBS > 1
#define HEARS(n, t) heard[n] = t; OVER(n, 0) OVER(n, 1)
#else
#define HEARS(n, t) heard[n] = t; OVER(n, 0)
#endif
#else
#define HEARS(n, t) heard[n] = t;
#endif

#define hear(n, j, t) HEARS(n, t) turn[n] = (j) + 1

#if BUG == GENERATION
#define ALLOWED(n, g) true
#else
#define ALLOWED(n, g) ((g) > refused[n])
#endif

/* What was done here has no effect when it comes again: as long as memories last, its copies need not be remembered. */
#if BUG == FSYNC || BUG == OWNER
#define SPENT(j, order)
#else
#if MASTERS > 1
#define SPENT(j, order) sent[j] = sent[j] & ~(order); sent[JOBS + j] = sent[JOBS + j] & ~(order);
#else
#define SPENT(j, order) sent[j] = sent[j] & ~(order);
#endif
#endif
#define done(j, order) memory[j] = memory[j] | (order); SPENT(j, order) reply[j] = reply[j] | (order)

/* The process of a guest ends; a source that sent its memory there runs again. */
inline gone(n) {
    guest[n] = NONE; has[n] = 0;
    if
    :: guest[OTHER(n)] == STILL -> guest[OTHER(n)] = RUN
    :: else
    fi
}

/* agent/guests.py stop: the guest ends, then the promise, then the answer. */
inline stop(n, j, g, order) {
    /* Never a guest lost without a decision. */
    assert(guest[n] != RUN || (g) >= has[n]);                   /* a late order ends no newer guest */
    if
    :: ((order) == KILL_TARGET || (order) == UNINCOMING) -> assert(guest[OTHER(n)] != MIGRATED || guest[n] == NONE)
    :: ((order) == CLEAR_SOURCE || (order) == RELEASE_SOURCE) -> assert(guest[n] != RUN && guest[n] != STILL)
    :: ((order) == RELEASE_TARGET) -> assert(guest[n] != RUN)
    :: else
    fi;
    gone(n);
    if
    :: (g) > refused[n] -> refused[n] = (g)
    :: else
    fi;
    done(j, order)
}

/* The lock of the instance in the agent: whoever has begun to start it goes first; but the undo of that very start breaks it off. */
#define UNLOCKED(n) (begun[n] == 0)

/* Every order of job j in term t that may arrive now. */
#define ARRIVES(j, t) \
    :: d_step { COMES(H[j], j, t, RELEASE) && UNLOCKED(H[j]) && guest[H[j]] == NONE -> \
        hear(H[j], j, t); \
        if :: R[j] > refused[H[j]] -> refused[H[j]] = R[j] :: else fi; \
        done(j, RELEASE) } \
    :: d_step { COMES(T[j], j, t, START) && !(memory[j] & UNSTART) && trust[T[j]] && UNLOCKED(T[j]) && ALLOWED(T[j], G[j]) \
            && guest[T[j]] == NONE -> hear(T[j], j, t); begun[T[j]] = (j) + 1 } \
    :: d_step { COMES(T[j], j, t, START) && !(memory[j] & UNSTART) && trust[T[j]] && UNLOCKED(T[j]) && ALLOWED(T[j], G[j]) \
            && guest[T[j]] == RUN && has[T[j]] == G[j] -> hear(T[j], j, t); done(j, START) } \
    :: d_step { COMES(C[j], j, t, COLD) && trust[C[j]] && UNLOCKED(C[j]) && ALLOWED(C[j], G[j] + 1) && guest[C[j]] == NONE -> \
        hear(C[j], j, t); begun[C[j]] = (j) + 101 } \
    :: d_step { COMES(C[j], j, t, COLD) && trust[C[j]] && UNLOCKED(C[j]) && ALLOWED(C[j], G[j] + 1) && guest[C[j]] == RUN \
            && has[C[j]] == G[j] + 1 -> hear(C[j], j, t); done(j, COLD) } \
    :: d_step { COMES(T[j], j, t, UNSTART) && (UNLOCKED(T[j]) || begun[T[j]] == (j) + 1) -> \
        hear(T[j], j, t); begun[T[j]] = 0; stop(T[j], j, G[j], UNSTART); SPENT(j, START) check() } \
    :: d_step { COMES(H[j], j, t, END) && UNLOCKED(H[j]) -> hear(H[j], j, t); stop(H[j], j, R[j], END); check() } \
    :: d_step { COMES(T[j], j, t, INCOMING) && !(memory[j] & UNINCOMING) && trust[T[j]] && UNLOCKED(T[j]) && ALLOWED(T[j], G[j]) \
            && guest[T[j]] == NONE -> \
        hear(T[j], j, t); guest[T[j]] = WAITING; has[T[j]] = G[j]; done(j, INCOMING) } \
    :: d_step { COMES(T[j], j, t, UNINCOMING) && UNLOCKED(T[j]) -> hear(T[j], j, t); stop(T[j], j, G[j], UNINCOMING); SPENT(j, INCOMING) check() } \
    :: d_step { COMES(H[j], j, t, OUT) && !(memory[j] & UNOUT) && trust[H[j]] && guest[H[j]] == RUN && guest[T[j]] == WAITING -> \
        hear(H[j], j, t); guest[H[j]] = STILL; done(j, OUT) } \
    :: d_step { COMES(H[j], j, t, UNOUT) && trust[H[j]] -> \
        hear(H[j], j, t); \
        if :: guest[H[j]] == STILL -> guest[H[j]] = RUN :: else fi; \
        done(j, UNOUT); SPENT(j, OUT) check() } \
    :: d_step { COMES(H[j], j, t, GO_ON) && trust[H[j]] && guest[H[j]] == STILL && guest[OTHER(H[j])] == WAITING -> \
        hear(H[j], j, t); guest[H[j]] = MIGRATED; guest[OTHER(H[j])] = ARRIVING; done(j, GO_ON) } \
    :: d_step { COMES(T[j], j, t, RESUME) && trust[T[j]] && UNLOCKED(T[j]) && ALLOWED(T[j], G[j]) && guest[T[j]] == LOADED -> \
        hear(T[j], j, t); guest[T[j]] = RUN; done(j, RESUME); check() } \
    :: d_step { COMES(T[j], j, t, KILL_TARGET) && UNLOCKED(T[j]) -> hear(T[j], j, t); stop(T[j], j, G[j], KILL_TARGET); check() } \
    :: d_step { COMES(H[j], j, t, CLEAR_SOURCE) && UNLOCKED(H[j]) -> hear(H[j], j, t); stop(H[j], j, G[j] - 1, CLEAR_SOURCE); check() } \
    :: d_step { COMES(H[j], j, t, RELEASE_SOURCE) && UNLOCKED(H[j]) -> hear(H[j], j, t); stop(H[j], j, G[j], RELEASE_SOURCE); check() } \
    :: d_step { COMES(T[j], j, t, RELEASE_TARGET) && UNLOCKED(T[j]) -> hear(T[j], j, t); stop(T[j], j, G[j], RELEASE_TARGET); check() }

/* What else happens on a node. */
#define COLD_ONE(n) (begun[n] > 100)
#define JOB_OF(n) (COLD_ONE(n) -> begun[n] - 101 : begun[n] - 1)

inline forgets(n, j) {
    if
    :: T[j] == n -> memory[j] = memory[j] & ~TO_TARGET
    :: else
    fi;
    if
    :: H[j] == n -> memory[j] = memory[j] & ~TO_HOLDER
    :: else
    fi
}

#if BUG == FSYNC
#define MEMORY_LOST(n) refused[n] = 0; turn[n] = 0; heard[n] = 0; forgets(n, 0); forgets(n, JOBS - 1);
#else
#define MEMORY_LOST(n)
#endif

#define HAPPENS(n) \
    /* agent/guests.py start: the disks are attached; Contact.check and the guest's start, as one */ \
    :: atomic { begun[n] != 0 && trust[n] -> \
        guest[n] = RUN; \
        has[n] = (COLD_ONE(n) -> G[JOB_OF(n)] + 1 : G[JOB_OF(n)]); \
        if \
        :: COLD_ONE(n) -> done(begun[n] - 101, COLD) \
        :: !COLD_ONE(n) -> done(begun[n] - 1, START) \
        :: trust[n] = false     /* the agent dies before it has written that down */ \
        fi; \
        begun[n] = 0; \
        check() } \
    /* it fails; or the check refuses */ \
    :: d_step { begun[n] != 0 -> begun[n] = 0 } \
    /* agent/contact.py: no report was answered for TRUST seconds; or the agent is another process */ \
    :: d_step { trust[n] -> trust[n] = false; begun[n] = 0 } \
    :: d_step { trust[n] -> trust[n] = false } \
    /* agent/report.py, master/leader.py report: a report comes and is answered. TRUST counts from when it was sent. */ \
    :: d_step { !fresh[n] || heard[n] < term || trust[n] != !proof[n] -> HEARS(n, term) fresh[n] = true; trust[n] = !proof[n] } \
    /* master/health.py: the grace is over. TRUST is shorter than GRACE. */ \
    :: d_step { fresh[n] && !trust[n] -> fresh[n] = false } \
    /* the power fails */ \
    :: d_step { guest[n] != NONE || begun[n] != 0 || BUG == FSYNC -> \
        gone(n); begun[n] = 0; trust[n] = false; \
        MEMORY_LOST(n) \
        check() } \
    /* qemu/watchdog.py, or a late guest.migrate_cancel */ \
    :: d_step { guest[n] == STILL -> guest[n] = RUN; check() } \
    /* the target has loaded everything */ \
    :: d_step { guest[n] == ARRIVING -> guest[n] = LOADED } \
    /* a target without its source's memory ends when the connection breaks */ \
    :: d_step { guest[n] == WAITING -> gone(n); check() } \
    /* node.declare-dead and job resume --node-is-dead: a person has looked. There is no guest; orders may be on their way all the same. */ \
    :: d_step { !proof[n] && !fresh[n] && guest[n] == NONE -> proof[n] = true } \
    /* nodes.py node.readmit: it reports again */ \
    :: d_step { proof[n] && fresh[n] && readmit[n] == 0 && !LOCKED(n) -> \
        if \
        :: !NODES_OF_CLAIM(n) && generation > 0 -> readmit[n] = 1; refuse[n] = generation \
        :: else -> readmit[n] = 2 \
        fi } \
    :: d_step { readmit[n] == 1 && UNLOCKED(n) -> \
        assert(guest[n] == NONE); \
        if :: refuse[n] > refused[n] -> refused[n] = refuse[n] :: else fi; \
        HEARS(n, term) \
        readmit[n] = 2; refuse[n] = 0 } \
    :: d_step { readmit[n] == 2 -> proof[n] = false; readmit[n] = 0 }

#define ACKNOWLEDGED(n) (n == 0 || heard[n] == term || proof[n])
#define GOES (ready && job < JOBS)

active proctype cluster() {
    fresh[1] = true; fresh[2] = true; trust[1] = true; trust[2] = true; heard[1] = 1; heard[2] = 1;
    if                                                          /* at first it is stopped, or runs on node 1 */
    :: true
    :: generation = 1; holder = 1; guest[1] = RUN; has[1] = 1
    fi;
    do
    /* --- a job gets the lock --- */
    :: atomic { GOES && pc == IDLE && !proof[1] && readmit[1] == 0 && target == 0 -> begin_start(1) }
    :: atomic { GOES && pc == IDLE && !proof[2] && readmit[2] == 0 && target == 0 -> begin_start(2) }
#if STOP
    :: d_step { GOES && pc == IDLE && holder != 0 && !proof[holder] -> begin_stop() }
#endif
#if MIGRATE
    :: d_step { GOES && pc == IDLE && holder != 0 && !proof[1] && !proof[2] && readmit[1] == 0 && readmit[2] == 0 -> begin_migration() }
#endif
    /* --- start --- */
    :: d_step { GOES && pc == W_RELEASE && ANSWERED(RELEASE) -> free(H[job], R[job]); pc = TAKE }
    :: d_step { GOES && pc == W_RELEASE -> end_job() }
    :: d_step { GOES && pc == TAKE -> take() }
    :: d_step { GOES && pc == W_START && ANSWERED(START) -> end_job() }
    :: d_step { GOES && pc == W_START -> start_failed() }
    :: d_step { GOES && pc == W_UNSTART && (ANSWERED(UNSTART) || proof[T[job]]) -> start_undone() }
    /* --- stop --- */
    :: d_step { GOES && pc == W_END && ANSWERED(END) -> free(H[job], R[job]); end_job() }
    :: d_step { GOES && pc == W_END -> end_job() }
    /* --- migration, until its commit --- */
    :: d_step { GOES && pc == W_INCOMING && ANSWERED(INCOMING) -> send(OUT, W_OUT) }
    :: d_step { GOES && pc == W_INCOMING -> send(UNINCOMING, W_UNINCOMING) }
    :: d_step { GOES && pc == W_OUT && ANSWERED(OUT) -> send(GO_ON, W_GO_ON) }
    :: d_step { GOES && pc == W_OUT -> send(UNOUT, W_UNOUT) }
    :: d_step { GOES && pc == W_UNOUT && (ANSWERED(UNOUT) || proof[H[job]]) -> send(UNINCOMING, W_UNINCOMING) }
    :: d_step { GOES && pc == W_UNINCOMING && (ANSWERED(UNINCOMING) || proof[T[job]]) -> target = 0; end_job() }
    /* --- settle --- */
    :: d_step { GOES && pc == W_GO_ON && ANSWERED(GO_ON) -> verdict_target() }
    :: d_step { GOES && pc == W_GO_ON -> pc = LOOK }
    :: d_step { GOES && pc == LOOK -> seen = (proof[H[job]] -> NONE : guest[H[job]]); pc = LOOK_AGAIN }
    :: d_step { GOES && pc == LOOK_AGAIN && seen == MIGRATED -> verdict_target() }
    :: d_step { GOES && pc == LOOK_AGAIN && (seen == RUN || seen == STILL) ->  /* guest.migrate_cancel, answered */
        if
        :: guest[H[job]] == STILL -> guest[H[job]] = RUN; check(); verdict_source()
        :: guest[H[job]] == RUN -> verdict_source()
        :: guest[H[job]] == MIGRATED -> verdict_target()
        :: else -> seen = 0; pc = LOOK
        fi }
    :: d_step { GOES && pc == LOOK_AGAIN && seen == NONE ->
        if
        :: !proof[T[job]] && (guest[T[job]] == LOADED || guest[T[job]] == RUN) -> verdict_target()
        :: proof[T[job]] || guest[T[job]] == NONE || guest[T[job]] == WAITING || guest[T[job]] == ARRIVING -> verdict_nobody()
        fi }
    :: d_step { GOES && pc == LOOK_AGAIN -> seen = 0; pc = LOOK }
    :: d_step { GOES && pc == W_RESUME && ANSWERED(RESUME) -> send(CLEAR_SOURCE, W_CLEAR_SOURCE) }
    :: d_step { GOES && pc == W_RESUME && (proof[T[job]] || guest[T[job]] == NONE) -> verdict_nobody() }
    :: d_step { GOES && pc == W_CLEAR_SOURCE && (ANSWERED(CLEAR_SOURCE) || proof[H[job]]) -> end_job() }
    :: d_step { GOES && pc == W_KILL_TARGET && (ANSWERED(KILL_TARGET) || proof[T[job]]) -> end_job() }
    :: d_step { GOES && pc == W_RELEASE_SOURCE && (ANSWERED(RELEASE_SOURCE) || proof[H[job]]) -> send(RELEASE_TARGET, W_RELEASE_TARGET) }
    :: d_step { GOES && pc == W_RELEASE_TARGET && (ANSWERED(RELEASE_TARGET) || proof[T[job]]) && !proof[1] -> cold_start(1) }
    :: d_step { GOES && pc == W_RELEASE_TARGET && (ANSWERED(RELEASE_TARGET) || proof[T[job]]) && !proof[2] -> cold_start(2) }
    :: d_step { GOES && pc == W_COLD && ANSWERED(COLD) -> end_job() }
    /* --- the master dies, and the next one takes up the job --- */
#if MASTERS > 1
    :: d_step { term < MASTERS ->
        term++;
        ready = false;
        if :: pc == LOOK_AGAIN -> pc = LOOK; seen = 0 :: else fi;
#if BUG == GRACE
        fresh[1] = false; fresh[2] = false
#else
        fresh[1] = true; fresh[2] = true
#endif
        }
    :: d_step { heard[1] < term -> HEARS(1, term) }             /* rpc/agents.py greet */
    :: d_step { heard[2] < term -> HEARS(2, term) }
    :: d_step { !ready && (job == JOBS || pc == IDLE || (ACKNOWLEDGED(H[job]) && ACKNOWLEDGED(T[job]))) ->
        ready = true;
        if
        :: job < JOBS -> send(AWAITED, pc)
        :: else
        fi }
#endif
#if BUG == OWNER
    :: d_step { begun[1] == 0 && guest[1] == NONE ->              /* the directory of node 2, copied to node 1 */
        refused[1] = refused[2]; turn[1] = turn[2]; heard[1] = heard[2]; trust[1] = false; forgets(1, 0); forgets(1, JOBS - 1) }
#endif
    ARRIVES(0, 1)
#if JOBS > 1
    ARRIVES(1, 1)
#endif
#if JOBS > 2
    ARRIVES(2, 1)
#endif
#if MASTERS > 1
    ARRIVES(0, 2)
#if JOBS > 1
    ARRIVES(1, 2)
#endif
#endif
    HAPPENS(1)
    HAPPENS(2)
    od
}
