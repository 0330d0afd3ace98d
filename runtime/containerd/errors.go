// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// native turns a gRPC error into one that errdefs knows. The client's own
// wrappers have done it already; the bare task service has not.
func native(err error) error {
	if _, grpc := status.FromError(err); err == nil || !grpc {
		return err
	}
	return errgrpc.ToNative(err)
}

// isNotFound and its like take errors of both kinds.
func isNotFound(err error) bool    { return errdefs.IsNotFound(native(err)) }
func isExists(err error) bool      { return errdefs.IsAlreadyExists(native(err)) }
func isUnavailable(err error) bool { return errdefs.IsUnavailable(native(err)) }

// gone answers nil for an error that says that something is not there.
func gone(err error) error {
	if isNotFound(err) {
		return nil
	}
	return err
}

// commandError tells a command that cannot be run from a runtime that cannot
// run one. runc says it in words only.
func commandError(err error) error {
	msg := err.Error()
	for _, sign := range []string{
		"executable file not found",
		`exec: "`, // exec: "x": permission denied, is a directory, ...
		"exec format error",
		"mkdir /proc/self/cwd", // a workdir that cannot be made
		"chdir to cwd",
	} {
		if strings.Contains(msg, sign) {
			return fmt.Errorf("%w: %s", runtime.ErrCommand, trimRunc(msg))
		}
	}
	return err
}

// trimRunc cuts the layers of runc's and the shim's wrapping.
func trimRunc(msg string) string {
	if i := strings.LastIndex(msg, "unable to start container process: "); i >= 0 {
		msg = msg[i+len("unable to start container process: "):]
	}
	msg = strings.TrimPrefix(msg, "error during container init: ")
	return strings.TrimSuffix(strings.TrimSpace(msg), ": unknown")
}

// notRunning turns "no such process" of a signal or exec into the sentinel.
func notRunning(err error) error {
	n := native(err)
	if errdefs.IsNotFound(n) || errdefs.IsFailedPrecondition(n) ||
		strings.Contains(err.Error(), "process already finished") || strings.Contains(err.Error(), "container not running") ||
		strings.Contains(err.Error(), "cannot exec in a stopped") {
		return fmt.Errorf("%w: %w", runtime.ErrNotRunning, n)
	}
	return n
}
