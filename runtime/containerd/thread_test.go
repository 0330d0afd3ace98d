// SPDX-License-Identifier: Apache-2.0

package containerd

import goruntime "runtime"

// lockThread keeps the goroutine on its thread for the rest of both their lives.
func lockThread() { goruntime.LockOSThread() }
