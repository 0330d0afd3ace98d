// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"syscall"
	"time"
)

// ExitReason says why a sandbox is no longer running.
type ExitReason string

// The reasons.
const (
	Exited       ExitReason = "exited"        // the command ended by itself
	Signaled     ExitReason = "signaled"      // a signal that nobody of Bulkhead sent
	OOM          ExitReason = "oom"           // killed at its memory limit
	TTL          ExitReason = "ttl"           // lifetime over
	StoppedBy    ExitReason = "stopped"       // somebody asked
	LaunchFailed ExitReason = "launch_failed" // the command never ran
	LostExit     ExitReason = "lost"          // the machine lost it, for example in a reboot
)

// Exit is how a sandbox ended.
type Exit struct {
	Reason  ExitReason `json:"reason"`
	Code    int        `json:"code"`
	Signal  int        `json:"signal,omitempty"`
	By      string     `json:"by,omitempty"`
	Message string     `json:"message"`
	Time    time.Time  `json:"time"`
}

// Ended is what is known when a command has ended.
type Ended struct {
	Code      int // the runtime's: 128+n for signal n
	Time      time.Time
	OOMKilled bool // the kernel killed something in it for its memory limit
	Limits    Limits
	TTL       time.Duration
	Stop      *StopRequest // nil if nobody asked
}

// Explain turns what is known into the exit record. A stop request explains an
// end that came after it unless the command ended with a code of its own; the
// kernel's OOM kill explains a KILL that nobody asked for. The runtime reports
// signal n as 128+n, which a command can also answer itself; codes of 129 to
// 159 are read as signals.
func (e Ended) Explain() Exit {
	x := Exit{Code: e.Code, Time: e.Time.UTC()}
	if e.Code > 128 && e.Code < 160 {
		x.Signal = e.Code - 128
	}
	switch {
	case e.OOMKilled && x.Signal == int(syscall.SIGKILL) && e.Stop == nil:
		x.Reason = OOM
		x.Message = fmt.Sprintf("out of memory at its limit of %d bytes", e.Limits.MemoryBytes)
	case e.Stop != nil && e.Stop.Reason == TTL:
		x.Reason = TTL
		x.Message = fmt.Sprintf("lifetime of %s is over", e.TTL)
	case e.Stop != nil:
		x.Reason, x.By = e.Stop.Reason, e.Stop.By
		x.Message = e.Stop.Message
		if x.Message == "" {
			x.Message = "stopped by " + e.Stop.By
		}
	case x.Signal != 0:
		x.Reason = Signaled
		x.Message = fmt.Sprintf("ended by signal %d (%s)", x.Signal, syscall.Signal(x.Signal))
	default:
		x.Reason = Exited
		x.Message = fmt.Sprintf("exited with code %d", e.Code)
	}
	return x
}
