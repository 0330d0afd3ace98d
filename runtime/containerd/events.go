// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"sync"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/typeurl/v2"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// news is what containerd's events have said of one task. Events are not kept
// by containerd: what happens while nobody listens is not told. Nothing but the
// reason of an exit rests on them.
type news struct {
	mu      sync.Mutex
	oom     bool
	exit    *runtime.Exit // of the command, kept for when containerd forgets it
	changed chan struct{} // closed and renewed with every change; nil until someone waits
}

// set changes n and wakes whoever waits.
func (n *news) set(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
	if n.changed != nil {
		close(n.changed)
		n.changed = nil
	}
}

// await waits until ready says so, at most for grace.
func (n *news) await(ctx context.Context, grace time.Duration, ready func() bool) bool {
	limit := time.NewTimer(grace)
	defer limit.Stop()
	for {
		n.mu.Lock()
		if ready() {
			n.mu.Unlock()
			return true
		}
		if n.changed == nil {
			n.changed = make(chan struct{})
		}
		changed := n.changed
		n.mu.Unlock()
		if grace <= 0 {
			return false
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		case <-limit.C:
			return false
		}
	}
}

func (n *news) oomKilled(ctx context.Context, grace time.Duration) bool {
	return n.await(ctx, grace, func() bool { return n.oom })
}

// lostExit answers the exit of a task that containerd knows no more.
func (n *news) lostExit(ctx context.Context, grace time.Duration) (exit runtime.Exit, ok bool) {
	n.await(ctx, grace, func() bool {
		if n.exit != nil {
			exit, ok = *n.exit, true
		}
		return ok
	})
	return exit, ok
}

// watchEvents listens until the context ends, over restarts of containerd.
func (r *Runtime) watchEvents(ctx context.Context) {
	filter := func(topic string) string { return "namespace==" + r.cfg.Namespace + `,topic=="` + topic + `"` }
	for pause := retryMin; ctx.Err() == nil; pause = min(2*pause, retryMax) {
		ch, errs := r.client.EventService().Subscribe(ctx, filter("/tasks/oom"), filter("/tasks/exit"))
		for listening := true; listening; {
			select {
			case e := <-ch:
				pause = retryMin
				r.note(e)
			case err := <-errs:
				listening = false
				if err != nil && ctx.Err() == nil {
					r.log.DebugContext(ctx, "containerd events", "err", err)
				}
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// note keeps what an event says of a known task.
func (r *Runtime) note(e *events.Envelope) {
	if e == nil || e.Event == nil {
		return
	}
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		r.log.Debug("containerd event", "topic", e.Topic, "err", err)
		return
	}
	switch v := v.(type) {
	case *eventtypes.TaskOOM:
		if t := r.recall(v.ContainerID); t != nil {
			t.news.set(func() { t.news.oom = true })
		}
	case *eventtypes.TaskExit:
		// Exits of exec'd processes carry the same container id.
		if t := r.recall(v.ContainerID); t != nil && v.ID == v.ContainerID {
			exit := runtime.Exit{Code: v.ExitStatus, Time: v.ExitedAt.AsTime()}
			t.news.set(func() { t.news.exit = &exit })
		}
	}
}
