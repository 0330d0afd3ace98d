// SPDX-License-Identifier: Apache-2.0

// Package runtimetest has a working miniature of a container runtime, the suite
// that it and the real one pass, and images for both.
//
// A Node is what outlives a process: images, tasks, leftovers. Open answers a
// Fake, a runtime.Runtime on it, as often as the process under test restarts.
// The Fake runs scripts of a few words (see script) in goroutines instead of
// programs in containers. It keeps states, exits, logs, streams and errors as
// the real one does, and fails where a test tells it to (Node.Fault). It
// enforces nothing: limits, users and namespaces are only remembered.
//
// Lock order: Node.mu, then fakeTask.mu. Neither is held while a writer of a
// caller is called.
package runtimetest

import (
	"errors"
	goruntime "runtime"
)

const goarch = goruntime.GOARCH

var errNotStatic = errors.New("not a static program")
